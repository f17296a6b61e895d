import os
from unittest.mock import patch

import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")  # which Keras reads once, when it is imported

from doors import DOORS, INTERPRETED, without_native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a door runs through all of them; one of a dtype, too, in all that a door has."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "door" not in metafunc.fixturenames or any("door" in each for each in named):
        return
    if "dtype" in metafunc.fixturenames and "dtype" not in named:
        pairs = [(door, dtype) for door in DOORS for dtype in door.dtypes]
        names = [f"{door.name}-{dtype}" for door, dtype in pairs]
        metafunc.parametrize(("door", "dtype"), pairs, ids=names)
    else:
        metafunc.parametrize("door", DOORS, ids=[door.name for door in DOORS])


@pytest.fixture(name="without_native")
def _without_native():
    with without_native():
        yield


if INTERPRETED:
    from gpu_code import interpreter

    interpreter.mend()

    @pytest.fixture(autouse=True)
    def _by_gpu_kernels():
        with without_native(), patch("batchnorm.torch._gpu.DEVICES", {"cpu"}):
            yield
