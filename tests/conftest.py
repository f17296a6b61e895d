import pytest
from doors import DOORS, Door, without_native


@pytest.fixture(params=DOORS, ids=lambda door: door.name)
def door(request: pytest.FixtureRequest) -> Door:
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a door and a dtype runs in all dtypes that the door has."""
    if {"door", "dtype"} <= set(metafunc.fixturenames):
        pairs = [(door, dtype) for door in DOORS for dtype in door.dtypes]
        names = [f"{door.name}-{dtype}" for door, dtype in pairs]
        metafunc.parametrize(("door", "dtype"), pairs, ids=names)


@pytest.fixture(name="without_native")
def _without_native():
    with without_native():
        yield
