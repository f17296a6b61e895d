"""A normalization and the layer before it as one layer."""

from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ... import checks, layers
from .layers import BatchNorm

Folded = TypeVar("Folded", nnx.Conv, nnx.ConvTranspose, nnx.Linear)


def fold(layer: Folded, normalization: nnx.BatchNorm) -> Folded:
    """Make one layer of a convolution or linear layer and the normalization of its output.

    ``fold(layer, normalization)(x)`` is ``normalization(layer(x), use_running_average=True)``. It
    is computed in float64, and stored in the dtype of the layer's kernel.

    Parameters
    ----------
    layer : nnx.Conv, nnx.ConvTranspose or nnx.Linear
        It stays as it is.
    normalization : nnx.BatchNorm, or ours
        Over the last axis, of as many features as the layer makes; without an activation.

    Returns
    -------
    A new layer, of the class of `layer`, with a bias; its output has the dtype of that of `layer`

    Raises
    ------
    TypeError
        If layer or normalization is something else, a subclass for instance, which may compute
        something of its own; or if the kernel is of complex numbers.
    ValueError
        If the normalization is over another axis than -1, has an activation or another number of
        features, or if what comes out is not finite in the dtype of the kernel.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from batchnorm.flax.nnx import BatchNorm, fold
    >>> conv, norm = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), BatchNorm(8, rngs=nnx.Rngs(0))
    >>> x = jnp.linspace(-1, 1, 96).reshape(2, 4, 4, 3)
    >>> y = norm(conv(x))  # which moves the running averages
    >>> wanted = norm(conv(x), use_running_average=True)
    >>> bool(jnp.allclose(fold(conv, norm)(x), wanted, atol=1e-5))
    True
    """
    if type(layer) not in (nnx.Conv, nnx.ConvTranspose, nnx.Linear):
        raise TypeError(
            "layer must be an nnx.Conv, nnx.ConvTranspose or nnx.Linear itself, but got "
            f"{type(layer).__module__}.{type(layer).__name__}."
        )
    if type(normalization) not in (nnx.BatchNorm, BatchNorm):
        raise TypeError(
            "normalization must be a flax.nnx.BatchNorm or a batchnorm.flax.nnx.BatchNorm itself, "
            f"but got {type(normalization).__module__}.{type(normalization).__name__}."
        )
    activation = getattr(normalization, "activation", None)
    if activation is not None:
        raise ValueError(
            f"normalization has activation={activation!r}, which a folded layer can't have. Set it "
            f"to None, and call flax.nnx.{activation} after the layer."
        )
    if normalization.axis not in (-1, (-1,), [-1]):
        raise ValueError(
            "normalization must be over axis -1, in which are the features of the layer before it, "
            f"but its axis is {normalization.axis!r}."
        )
    kernel = layer.kernel[...]
    checks.floating("layer.kernel", kernel.dtype, jnp.issubdtype(kernel.dtype, jnp.floating))
    checks.number_of_channels(
        layer.out_features, normalization.num_features, kernel.shape, "layer.kernel"
    )
    # The kernel of a transposed convolution may be that of the convolution which it transposes.
    is_turned = getattr(layer, "transpose_kernel", False)
    parameters = layers.folded(
        _exact(layer.kernel),
        _exact(layer.bias),
        (-1, 1) if is_turned else (-1,),
        mean=_exact(normalization.mean),
        var=_exact(normalization.var),
        scale=_exact(normalization.scale),
        shift=_exact(normalization.bias),
        eps=float(normalization.epsilon),
    )
    new_kernel, new_bias = (jnp.asarray(each, kernel.dtype) for each in parameters)
    if not (jnp.isfinite(new_kernel).all() and jnp.isfinite(new_bias).all()):
        layers.refuse_infinite_fold(kernel.dtype)
    new = nnx.clone(layer)
    new.kernel[...] = new_kernel
    if new.bias is None:
        new.bias, new.use_bias = nnx.Param(new_bias), True
    else:
        new.bias[...] = new_bias
    return new


def _exact(variable: Any) -> Any:
    return None if variable is None else np.asarray(variable[...]).astype(np.float64)
