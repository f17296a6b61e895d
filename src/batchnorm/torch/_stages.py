"""Who computes the stages of a call: kernels where they can serve, operations elsewhere."""

from ..definition import Inputs
from . import _native
from ._native import Native
from ._operations import Call, Operations


def stages_of(call: Call, inputs: Inputs, *, watched: bool) -> Operations:
    """`watched`: by what has to see operations, or differentiates them."""
    if not watched and _native.serves(inputs.x):
        return Native(call, inputs)
    return Operations(call, inputs)
