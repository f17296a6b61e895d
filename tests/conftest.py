import pytest
from doors import DOORS, without_native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test of a door runs through all of them; one of a dtype as well, in all that it has."""
    if {"door", "dtype"} <= set(metafunc.fixturenames):
        pairs = [(door, dtype) for door in DOORS for dtype in door.dtypes]
        names = [f"{door.name}-{dtype}" for door, dtype in pairs]
        metafunc.parametrize(("door", "dtype"), pairs, ids=names)
    elif "door" in metafunc.fixturenames:
        metafunc.parametrize("door", DOORS, ids=[door.name for door in DOORS])


@pytest.fixture(name="without_native")
def _without_native():
    with without_native():
        yield
