"""A normalization into the convolution or linear layer before it."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn
import numpy as np

from .. import checks, layers
from .layers import BatchNorm

_KINDS = tuple(
    getattr(mlx.nn, name)
    for name in (
        *("Conv1d", "Conv2d", "Conv3d", "Linear"),
        *("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    )
)


def fold(layer: Any, normalization: Any) -> Any:
    """Make one layer of a convolution or linear layer and the normalization of its output.

    ``fold(layer, normalization)(x)`` is ``normalization(layer(x))`` in evaluation: by the running
    statistics. It is computed in float64, and stored in the dtype of the layer's weight.

    Parameters
    ----------
    layer : mlx.nn.Conv1d, Conv2d, Conv3d, ConvTranspose1d, 2d, 3d or Linear
        It stays as it is.
    normalization : mlx.nn.BatchNorm, or ours
        Of as many features as the layer makes; without an activation.

    Returns
    -------
    mlx.nn.Module
        A new layer, of the class of `layer`, with a bias; its output has the dtype of that of
        `layer`.

    Raises
    ------
    TypeError
        If layer or normalization is something else, a subclass for instance, which may compute
        something of its own; or if the weight is of complex numbers.
    ValueError
        If the normalization has no running statistics, an activation or another number of features,
        or if what comes out is not finite in the dtype of the weight.

    Examples
    --------
    >>> import mlx.core as mx
    >>> import mlx.nn as nn
    >>> import batchnorm.mlx
    >>> conv, norm = nn.Conv2d(3, 8, 3, bias=False), batchnorm.mlx.BatchNorm(8)
    >>> x = mx.random.normal((2, 6, 6, 3))
    >>> y = norm(conv(x))  # which moves the running statistics
    >>> folded = batchnorm.mlx.fold(conv, norm)
    >>> mx.allclose(folded(x), norm.eval()(conv(x)), atol=1e-5).item()
    True
    """
    if type(layer) not in _KINDS:
        raise TypeError(
            "layer must be a convolution, transposed or not, or a Linear of mlx.nn itself, but got "
            f"{type(layer).__module__}.{type(layer).__name__}."
        )
    kinds = mlx.nn.BatchNorm, BatchNorm  # type: ignore[attr-defined]
    if type(normalization) not in kinds:
        raise TypeError(
            "normalization must be an mlx.nn.BatchNorm or a batchnorm.mlx.BatchNorm itself, but "
            f"got {type(normalization).__module__}.{type(normalization).__name__}."
        )
    activation = getattr(normalization, "activation", None)
    if activation is not None:
        raise ValueError(
            f"normalization has activation={activation!r}, which a folded layer can't have. Set it "
            f"to None, and call mlx.nn.{activation} after the layer."
        )
    mean, var = normalization.get("running_mean"), normalization.get("running_var")
    if not normalization.track_running_stats or mean is None or var is None:
        raise ValueError(
            "normalization must have running statistics to fold, but it has none: it normalizes by "
            "those of each batch."
        )
    weight = layer.weight
    checks.floating("layer.weight", weight.dtype, mx.issubdtype(weight.dtype, mx.floating))
    checks.number_of_channels(len(weight), normalization.num_features, weight.shape, "layer.weight")
    scale = normalization.get("weight")
    shift = None if scale is None else normalization.get("bias")
    folded = layers.folded(
        _exact(weight),
        _exact(layer.get("bias")),
        (len(weight), *[1] * (weight.ndim - 1)),
        mean=_exact(mean),
        var=_exact(var),
        scale=_exact(scale),
        shift=_exact(shift),
        eps=float(normalization.eps),
    )
    new = copy.deepcopy(layer)
    new.weight, new.bias = (mx.array(each, dtype=weight.dtype) for each in folded)
    if not (mx.isfinite(new.weight).all() and mx.isfinite(new.bias).all()):
        layers.refuse_infinite_fold(weight.dtype)
    if "weight" not in layer.trainable_parameters():
        new.freeze(keys="bias", recurse=False)
    return new


def _exact(array: mx.array | None) -> Any:
    """In float64, by way of float32 where NumPy has no such dtype."""
    if array is None:
        return None
    is_exact = array.dtype == mx.float64
    return np.array(array if is_exact else array.astype(mx.float32)).astype(np.float64)
