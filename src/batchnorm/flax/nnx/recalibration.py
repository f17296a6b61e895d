"""Running averages that are exactly those of the data at hand."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np

from ...conventions import CONVENTIONS
from ...documentation import documented
from ...tools import recalibration
from ...tools.observation import call_of
from ._observation import normalizations, observed

_CONVENTION = CONVENTIONS["flax"]
Model = TypeVar("Model")


@documented(
    model="nnx.Module, or what else holds some",
    layers="flax.nnx and batchnorm.flax.nnx",
    divisor="count",
    others="The others run with deterministic=True.\n"
    "None may be within nnx.jit, nnx.remat or the like.",
)
def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    normalize_by: Literal["batch", "running"] = "batch",
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = True,
) -> None:
    """...

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import recalibrate
    >>> model = nnx.Sequential(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    >>> recalibrate(model, jnp.split(jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0]]), [3]))
    >>> print(model.layers[0].mean[...], model.layers[0].var[...])
    [3.] [2.]
    """
    known = recalibration.Model(
        found=dict(normalizations(model)),
        kinds="BatchNorm of flax.nnx and batchnorm.flax.nnx",
        forward=call_of(model, forward),
        observed=lambda see, by: observed(model, see, normalize_by=by),
        correction=_CONVENTION.correction,
        keep=_keep,
        running=_running,
        commit=_commit,
    )
    recalibration.recalibrate(known, batches, normalize_by=normalize_by, progress=progress)


def _keep(layer: Any) -> Callable[[], None]:
    mean, var = layer.mean[...], layer.var[...]

    def restore() -> None:
        layer.mean[...], layer.var[...] = mean, var

    return restore


def _running(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(layer.mean[...], np.float64), np.asarray(layer.var[...], np.float64)


def _commit(layer: Any, mean: np.ndarray, var: np.ndarray, _: int) -> None:
    layer.mean[...] = _like(layer.mean[...], mean)
    layer.var[...] = _like(layer.var[...], var)


def _like(old: Any, new: Any) -> Any:
    return jnp.asarray(new, old.dtype, device=getattr(old, "sharding", None))
