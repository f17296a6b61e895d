"""What is sick in a model's variables."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from flax import traverse_util

from ... import checks
from ...tools import Report
from ...tools.inspection import inspect_model
from ...tools.observation import call_of
from ...tools.states import state
from ._observation import observed

_DICTS: Any = traverse_util


def inspect(
    variables: Mapping[str, Any],
    batches: Iterable[Any] | None = None,
    *,
    apply: Callable[[Any, Any], object] | None = None,
) -> Report:
    """Say which batch normalizations of a model's variables are sick, and in which channels.

    Without batches, by what the layers keep; with batches, also by what comes to them. Layers are
    those of Linen, or ours; whichever they are in `apply`, they normalize by their averages.

    Parameters
    ----------
    variables : mapping
        With the collections "params" and "batch_stats", as `init` returns them.
    batches : iterable, optional
        What `apply` is called with, once each; of a tuple or list, its first element.
    apply : callable, optional
        Of the variables and a batch, to call the model in evaluation:
        ``lambda variables, images: model.apply(variables, images, train=False)``, say; and not
        within `jax.jit`.

    Returns
    -------
    batchnorm.tools.Report
        With `layers` and `findings`; print it. docs/tools.md says what each finding means.

    Raises
    ------
    TypeError
        If variables is no mapping, or there is one of batches and apply without the other.
    ValueError
        If the variables have no averages of a batch normalization, or batches are given, but there
        is none.

    Examples
    --------
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from batchnorm.flax.linen import inspect
    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> x = 100 + jax.random.normal(jax.random.key(1), (64, 4))
    >>> variables = model.init(jax.random.key(0), x)
    >>> print(inspect(variables).summary)
    1 normalization: info in 1.
    >>> report = inspect(variables, [x[:32], x[32:]], apply=model.apply)
    >>> [(each.layer, each.kind, each.severity) for each in report.findings]
    [('layers_1', 'drift', 'severe'), ('layers_1', 'never_updated', 'info')]
    """
    checks.instance("variables", variables, Mapping)
    if (batches is None) != (apply is None):
        given, absent = ("batches", "apply") if apply is None else ("apply", "batches")
        raise TypeError(f"{given} needs {absent}: apply(variables, batch) calls the model.")

    collections = (variables.get(name, {}) for name in ("params", "batch_stats"))
    arrays: dict[Any, Any] = {}
    for each in collections:
        arrays |= _DICTS.flatten_dict(each)
    states = [
        state("/".join(path), "flax", partial(_array, arrays, path), is_of_model=True)
        for *path, name in arrays
        if name == "var" and (*path, "mean") in arrays
    ]
    call = call_of(lambda x: apply(variables, x) if apply else None, None)
    return inspect_model(states, batches, observed, call)


def _array(arrays: Mapping[tuple[str, ...], Any], path: list[str], name: str) -> Any:
    return arrays.get((*path, name))
