"""The stages as one operation of MLX's graphs: whether it is here, and how it is called.

csrc/faces/mlx.cc is built for one version of MLX, which the name of its module holds; no other is
opened.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from .. import native
from ..definition import Inputs, Problem
from ..installation import REBUILD
from ..moments import Statistics

_DTYPES = (mx.float32, mx.float16, mx.bfloat16)  # float64 would need a mean of more than a double
_MOST_AXES = 12  # with four more under mx.vmap: kMaxRank in csrc/stages/layout.h


class Operands(NamedTuple):
    """The arrays of any stage; csrc/faces/mlx_operation.h says which takes which."""

    x: mx.array | None = None
    scale: mx.array | None = None
    bias: mx.array | None = None
    residual: mx.array | None = None
    weights: mx.array | None = None
    count: mx.array | None = None  # type: ignore[assignment]
    mean: mx.array | None = None
    var: mx.array | None = None
    running_mean: mx.array | None = None
    running_var: mx.array | None = None
    dy: mx.array | None = None
    dmean: mx.array | None = None
    dvar: mx.array | None = None


Definition = Callable[..., tuple[mx.array, ...]]


def version_of_mlx() -> str:
    return str(mx.__version__)  # type: ignore[attr-defined]


def _opened() -> tuple[Any, str]:
    """The module, or None; and what `native_status` says of it."""
    version = version_of_mlx()
    name = f"_mlx_{version.replace('.', '_')}"
    on_linux = sys.platform == "linux"
    if not on_linux or native.kernels is None or mx.metal.is_available() or mx.cuda.is_available():
        return None, "not served, as the kernels of MLX are for CPUs alone, on Linux"
    if importlib.util.find_spec(f"batchnorm.native.{name}") is None:
        return None, (
            f"not served, as no kernels were built for MLX {version}; for these, {REBUILD} "
            "(README.md says for which MLX that can be done)"
        )
    try:
        return importlib.import_module(f"batchnorm.native.{name}"), f"served, as MLX {version}"
    except ImportError as error:
        return None, (
            f"not served, as the kernels do not fit MLX {version} ({error}); "
            f"to build them anew, {REBUILD}"
        )


_module, _state = _opened()
native.register_report("MLX", lambda: _state)


def set_definition(definition: Definition) -> None:
    """Set what computes a stage where MLX needs a derivative that is not itself a stage.

    `definition(kind, operands, features, eps, activation, rate, correction)` gives its results.
    """
    if _module is not None:
        _module.set_definition(definition)


def serves(problem: Problem, inputs: Inputs) -> bool:
    """Whether the operation can take the place of operations here and now."""
    features, x, residual = problem.features, inputs.x, inputs.residual
    return (
        _module is not None
        and native.kernels is not None
        and x.dtype in _DTYPES
        and x.ndim <= _MOST_AXES
        and not isinstance(problem.eps, mx.array)
        and features[-1] - features[0] + 1 == len(features)
        and (residual is None or mx.result_type(x.dtype, residual.dtype) == x.dtype)
        and bool(_module.can_serve())
    )


def batch_norm(problem: Problem, inputs: Inputs) -> tuple[mx.array, Statistics]:
    """y in the dtype of x, and the statistics in float64."""
    y, *statistics = _call("batch_norm", problem, _operands(inputs))
    return y, Statistics(*statistics)


def statistics(problem: Problem, inputs: Inputs) -> Statistics:
    operands = _operands(Inputs(inputs.x, weights=inputs.weights))
    return Statistics(*_call("statistics", problem, operands))


def normalize(problem: Problem, inputs: Inputs, mean: mx.array, var: mx.array) -> mx.array:
    (y,) = _call("normalize", problem, _operands(inputs)._replace(mean=mean, var=var))
    return y


def update_running(
    mean: mx.array, var: mx.array, statistics: Statistics, *, rate: float, correction: int
) -> tuple[mx.array, ...]:
    """The new mean and variance, by statistics in float64."""
    operands = Operands(**statistics._asdict(), running_mean=mean, running_var=var)
    return _call("update_running", Problem(()), operands, rate, correction)


def runs() -> int:
    """How many stages have run so far; for tests."""
    return 0 if _module is None else int(_module.runs())


def _operands(inputs: Inputs) -> Operands:
    x, scale, bias, residual, weights = inputs
    if residual is not None:
        if residual.shape != x.shape:
            residual = residual.astype(mx.float32)  # in which its gradient is added up
        residual = mx.broadcast_arrays(residual, x)[0].astype(x.dtype)
    if weights is not None:
        missing = x.ndim - weights.ndim
        weights = mx.expand_dims(weights.astype(mx.float32), tuple(range(missing)))
    return Operands(x, scale, bias, residual, weights)


def _call(
    kind: str, problem: Problem, operands: Operands, rate: float = 0.0, correction: int = 0
) -> tuple[mx.array, ...]:
    found: tuple[mx.array, ...] = _module.call(
        kind,
        operands,
        problem.features,
        problem.eps,
        problem.activation or "",
        rate,
        correction,
    )
    return found
