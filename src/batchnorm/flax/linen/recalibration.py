"""Running averages that are exactly those of the data at hand."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import copy

from ... import checks
from ...conventions import CONVENTIONS
from ...documentation import documented
from ...tools import recalibration
from ...tools.observation import call_of
from ._observation import observed

_CONVENTION = CONVENTIONS["flax"]
_DICTS: Any = traverse_util


@documented(
    model="",
    layers="flax.linen and batchnorm.flax.linen",
    divisor="count",
    others="None may be within jax.jit, nn.remat, nn.scan or the like.",
)
def recalibrate(
    apply: Callable[[Any, Any], Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    normalize_by: Literal["batch", "running"] = "batch",
    progress: bool = True,
) -> Any:
    """...

    Parameters
    ----------
    apply : function of variables and an input
        Applies the model as in evaluation, not compiled:
        ``lambda variables, x: model.apply(variables, x, train=False)``, say.
    variables : dict of collections
        Not changed.

    Returns
    -------
    variables, with other "batch_stats"

    Examples
    --------
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from batchnorm.flax.linen import recalibrate
    >>> model, x = nn.BatchNorm(use_running_average=True), jnp.arange(1.0, 6.0)[:, None]
    >>> variables = model.init(jax.random.key(0), x)
    >>> variables = recalibrate(model.apply, variables, [x[:2], x[2:]])
    >>> print(variables["batch_stats"]["mean"], variables["batch_stats"]["var"])
    [3.] [2.]
    """
    checks.instance("variables", variables, Mapping)
    if not callable(apply):
        raise TypeError(f"apply must be a function of variables and an input, but got {apply!r}.")
    kept = dict(_DICTS.flatten_dict(variables.get("batch_stats", {})))
    new = dict(kept)

    def now() -> Any:
        return copy(variables, {"batch_stats": _DICTS.unflatten_dict(new)})

    def running(path: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        mean, var = (np.asarray(new[*path, name], np.float64) for name in ("mean", "var"))
        return mean, var

    def commit(path: tuple[str, ...], mean: np.ndarray, var: np.ndarray, _: int) -> None:
        for name, value in (("mean", mean), ("var", var)):
            before = new[*path, name]
            device = getattr(before, "sharding", None)  # of what was loaded, none perhaps
            new[*path, name] = jnp.asarray(value, before.dtype, device=device)

    known = recalibration.Model(
        found={"/".join(path): path for *path, name in map(tuple, kept) if name == "mean"},
        kinds='"batch_stats" of BatchNorm of flax.linen and batchnorm.flax.linen in variables',
        forward=call_of(lambda x: apply(now(), x), None),
        observed=lambda see, by: observed(see, normalize_by=by),
        correction=_CONVENTION.correction,
        keep=lambda path: lambda: None,  # what failed returns nothing
        running=running,
        commit=commit,
    )
    recalibration.recalibrate(known, batches, normalize_by=normalize_by, progress=progress)
    return now()
