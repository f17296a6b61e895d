"""Who computes the stages of a call: kernels where they can serve, operations elsewhere."""

from ..definition import Inputs
from . import _eager, _gpu, _native
from ._operations import Call, Operations


def stages_of(call: Call, inputs: Inputs, *, watched: bool) -> Operations:
    """`watched`: by what has to see operations, or differentiates them."""
    if not watched:
        if _native.serves(inputs.x):
            return _native.Native(call, inputs)
        if _gpu.serves(inputs.x) and (stages := _gpu.stages_by_kernels(call, inputs)):
            return stages
        if _eager.serves(call, inputs):
            return _eager.Eager(call, inputs)
    return Operations(call, inputs)
