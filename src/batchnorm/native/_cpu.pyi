"""The native kernels, stated for type checkers; csrc/faces/python.cc defines them.

An `Array` is a NumPy array, bfloat16 as two bytes, "V2", or a tensor of a registered type. None
stands for what is absent. Of the arrays of a call

- x, residual, dy, y, dx and dresidual share a shape, a dtype and strides, without gaps, the
  features side by side; y may be x itself, all else that is written shares memory with nothing;
- weights have the rank of x and its order in memory, and the size 1 along all features or none;
  they are float32, float64 if x is;
- statistics (the rows count, mean, var) and sums (of g, of g·x̂) are float64, in C order, a row of
  the feature shape each; batches is one int64;
- all others are of the feature shape, of any floating-point dtype and strides.

A stage returns None; or, when it has done nothing, the name of the first array that cannot be used
as it lies in memory. It raises ValueError where a shape does not go with x.
"""

from collections.abc import Sequence

from typing_extensions import CapsuleType

Array = object
Axes = tuple[int, ...]

DTYPES: list[str]
ACTIVATIONS: list[str]
STAGES: CapsuleType  # csrc/stages/table.h

def batch_norm(
    *,
    x: Array,
    features: Axes,
    eps: float,
    activation: str | None = None,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    statistics: Array,
    y: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    batches: Array | None = None,
    rate: float | None = None,
    team: CapsuleType | None = None,
) -> str | None:
    """Write statistics and y; then move running statistics as `update_running`, correction 1."""

def statistics(
    *,
    x: Array,
    features: Axes,
    weights: Array | None = None,
    statistics: Array,
    team: CapsuleType | None = None,
) -> str | None: ...
def normalize(
    *,
    x: Array,
    features: Axes,
    eps: float,
    activation: str | None = None,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    statistics: Array | None = None,
    mean: Array | None = None,
    var: Array | None = None,
    y: Array,
    team: CapsuleType | None = None,
) -> str | None:
    """By statistics, or by mean and var; with weights, y is NaN where x is not finite.

    A var with a negative element cannot be used, however it lies.
    """

def batch_norm_gradients(
    *,
    x: Array,
    features: Axes,
    eps: float,
    activation: str | None = None,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    statistics: Array | None = None,
    mean: Array | None = None,
    var: Array | None = None,
    dy: Array,
    dx: Array,
    dscale: Array | None = None,
    dbias: Array | None = None,
    dresidual: Array | None = None,
    team: CapsuleType | None = None,
) -> str | None:
    """With statistics, the batch's own; with mean and var, such as do not depend on x."""

def gradient_sums(
    *,
    x: Array,
    features: Axes,
    eps: float,
    activation: str | None = None,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    statistics: Array | None = None,
    mean: Array | None = None,
    var: Array | None = None,
    dy: Array,
    sums: Array,
    team: CapsuleType | None = None,
) -> str | None: ...
def input_gradient(
    *,
    x: Array,
    features: Axes,
    eps: float,
    activation: str | None = None,
    scale: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    weights: Array | None = None,
    statistics: Array | None = None,
    mean: Array | None = None,
    var: Array | None = None,
    sums: Array,
    dy: Array,
    dx: Array,
    dresidual: Array | None = None,
    team: CapsuleType | None = None,
) -> str | None: ...
def update_running(
    *,
    statistics: Array,
    running_mean: Array,
    running_var: Array,
    batches: Array | None = None,
    rate: float,
    correction: float,
) -> str | None:
    """Move a feature that has more than `correction` elements, and count a batch that has any."""

def layout(
    shape: Sequence[int], features: Axes, strides: Sequence[int] | None = None
) -> tuple[int, int, int] | None:
    """(outer, channels, inner) of an array with these strides, in elements, or in C order.

    None where it has gaps, or where its features do not lie side by side, in order.
    """

def fit(x: Array, /, *parameters: Array | None) -> bool:
    """Whether each is None or a tensor in memory, as long as axis 1 of x and of a dtype with it.

    That is the dtype of x, or float32 where x is float16 or bfloat16.
    """

def register_tensor(kind: type) -> bool:
    """Take arrays of exactly that type, if it has DLPack's C exchange API; say whether it has."""

def team(library: str) -> CapsuleType | None:
    """The OpenMP threads of a library that is loaded already, if it has any, for a stage to use."""

def num_threads() -> int: ...
def set_num_threads(threads: int, /) -> None: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def set_instruction_set(name: str, /) -> bool: ...
def last_level_cache_bytes() -> int: ...
def set_last_level_cache_bytes(size: int, /) -> None: ...
def xla_api_version() -> tuple[int, int] | None: ...
def xla_handlers() -> dict[str, CapsuleType]:
    """The handlers of csrc/faces/xla.cc by name; none where they were not built."""
