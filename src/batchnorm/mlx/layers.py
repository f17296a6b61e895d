"""The layer in the place of `mlx.nn.BatchNorm`."""

import math
from functools import lru_cache
from typing import Any, Self

import mlx.core as mx

from .. import checks
from ..conventions import CONVENTIONS
from ..definition import Inputs, Problem
from . import _stages
from ._arguments import Number, are_plain, check_number, check_parameters, checked, fraction
from ._compat import Layer, refuse_other_statistics

_CONVENTION = CONVENTIONS["mlx"]


class BatchNorm(Layer):
    """Batch normalization over the last axis, in the place of `mlx.nn.BatchNorm`, and one itself.

    In training, x is normalized by the mean and the population variance of each of its channels,
    which also move the running statistics; in evaluation, by the running statistics [1]_:
    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``.

    Running statistics are no trainable parameters, whatever is unfrozen, and stay float32, whatever
    `set_dtype` makes of the other parameters. An empty batch leaves them as they were.

    What is assigned to `weight`, `bias`, `running_mean` or `running_var` becomes an array of MLX: a
    number one of num_features elements. With None for `weight` there is no bias either.

    Parameters
    ----------
    num_features : int
        The number of channels, the size of the last axis.
    eps : float
        Added to the variance, inside the root.
    momentum : float within [0, 1]
        The weight of the batch in the running statistics. It and eps may also be arrays without
        axes, which are never trained, stay float32 and are not looked at: out of range, they count
        as NaN. As any array of a module, they are then part of its state and its saved weights.
    affine : bool
        Whether there are parameters `weight` and `bias`.
    track_running_stats : bool
        Whether there are running statistics. Without them, evaluation uses those of the batch.
    activation : None, "relu" or "silu"
        A layer that has one does not let `eps` be read, which see.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.

    Notes
    -----
    What MLX runs twice, it also counts twice: a layer within `mlx.nn.utils.checkpoint` moves its
    running statistics once more when it is run again. `mx.vmap` of a layer that moves running
    statistics leaves in them an array that belongs to the transformation, as with any state in MLX:
    use `eval()`, or `track_running_stats=False`, or the functions.

    References
    ----------
    .. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
       Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.

    Examples
    --------
    >>> import mlx.core as mx
    >>> import batchnorm.mlx
    >>> bn = batchnorm.mlx.BatchNorm(2)
    >>> print(bn(mx.array([[1.0, 20.0], [3.0, 60.0]])).round(3))
    array([[-1, -1],
           [1, 1]], dtype=float32)
    >>> print(bn.running_mean)
    array([0.2, 4], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        eps: Number = _CONVENTION.eps,
        momentum: Number = _CONVENTION.momentum,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
    ) -> None:
        # The messages of mlx.nn.BatchNorm itself, which programs may look for; so in __call__.
        if isinstance(eps, mx.array):
            check_number("eps", eps)
        elif not checks.is_real(eps):
            raise TypeError(f"[BatchNorm] 'eps' must be a positive number but got {eps!r}.")
        elif not 0 < float(eps) < math.inf:
            raise ValueError(f"[BatchNorm] 'eps' must be positive but got {eps}.")
        else:
            checks.positive_eps(eps)
        fraction("momentum", momentum)
        super().__init__(
            checks.positive_integer("num_features", num_features),
            checks.boolean("affine", affine),
            checks.boolean("track_running_stats", track_running_stats),
        )
        self.eps = eps
        self.momentum = momentum
        self.activation = checks.activation(activation)

    @property
    def eps(self) -> Number:
        """Added to the variance, inside the root.

        Raises
        ------
        RuntimeError
            If the layer has an activation: who reads eps builds another layer of this one, or
            folds it into a convolution, and would leave the activation out. What eps is says
            ``vars(layer)["eps"]``, or ``layer["eps"]`` where it is an array.
        """
        if self.activation is not None:
            raise RuntimeError(
                f"eps of this {type(self).__name__} with activation={self.activation!r} is asked "
                "for, as by what builds another layer of it, which would lose the activation "
                "without a word. Set activation to None before, and call "
                f"mlx.nn.{self.activation} after the layer. The number alone is "
                'vars(layer)["eps"], or layer["eps"] where it is an array.'
            )
        return self._own_eps()

    @eps.setter
    def eps(self, value: Any) -> None:
        self.__dict__["eps"] = value

    def _own_eps(self) -> Number:
        eps: Number = self["eps"] if "eps" in self else self.__dict__["eps"]
        return eps

    def unfreeze(
        self, *, recurse: bool = True, keys: str | list[str] | None = None, strict: bool = False
    ) -> Self:
        super().unfreeze(recurse=recurse, keys=keys, strict=strict)
        return self  # which that of mlx.nn.BatchNorm does not

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self._own_eps()}, momentum={self.momentum}, "
            f"affine={'weight' in self}, track_running_stats={self.track_running_stats}"
            + (f", activation={self.activation!r}" if self.activation else "")
        )

    def __call__(
        self, x: mx.array, residual: mx.array | None = None, mask: mx.array | None = None
    ) -> mx.array:
        """Normalize x and, in training, move the running statistics.

        Parameters
        ----------
        x : array of shape (N, C), (N, L, C) or (N, H, W, C), of a real floating-point dtype
        residual : array that broadcasts to x, optional
            Added before the activation.
        mask : array that broadcasts to x, optional
            Which elements count in the statistics, as in `batch_norm`.

        Returns
        -------
        y : array of the shape of x
            Of the dtype to which those of x and weight promote: float32 with float32 weights.

        Raises
        ------
        TypeError
            If an argument is no array, or not of a real floating-point dtype.
        ValueError
            If x has another rank or number of channels, if residual or mask does not broadcast, or
            if x has one value per channel in training.
        """
        refuse_other_statistics(self)
        weight = self.get("weight")
        bias = None if weight is None else self.get("bias")  # as in mlx.nn
        mean = var = None
        if self.track_running_stats:
            mean, var = self._running_statistics()
        problem, inputs = self._problem(x, weight, bias, mean, var, residual, mask)
        if mean is None or var is None:
            y, _ = _stages.batch_norm(problem, inputs)
        elif self.training:
            rate = _CONVENTION.rate(fraction("momentum", self.momentum))
            y, self["running_mean"], self["running_var"] = _stages.training_step(
                problem, inputs, mean, var, rate=rate, correction=_CONVENTION.correction
            )
        else:
            y = _stages.normalize(problem, inputs, mean, var)
        return y.astype(inputs.x.dtype)

    def _running_statistics(self) -> tuple[mx.array, mx.array]:
        mean, var = self.get("running_mean"), self.get("running_var")
        if mean is None or var is None:
            raise ValueError(
                "running_mean and running_var must be arrays while track_running_stats is "
                f"True, but {'running_mean' if mean is None else 'running_var'} is None or "
                "absent. Set both, or set track_running_stats to False to normalize by the "
                "statistics of each batch."
            )
        return mean, var

    def _problem(
        self,
        x: mx.array,
        weight: mx.array | None,
        bias: mx.array | None,
        mean: mx.array | None,
        var: mx.array | None,
        residual: mx.array | None,
        mask: mx.array | None,
    ) -> tuple[Problem, Inputs]:
        """What to do, and the inputs, checked; x in the dtype of y."""
        eps = self._own_eps()
        # What follows checks and casts: spared where there is nothing to find, nearly always.
        is_short = residual is None and mask is None and type(eps) is float
        if is_short and are_plain(x, weight, bias, mean, var):
            shape = x.shape
            is_one_value = self.training and x.size == self.num_features
            if 2 <= len(shape) <= 4 and shape[-1] == self.num_features and not is_one_value:
                activation = checks.activation(self.activation)
                return _over_last_axis(len(shape), eps, activation), Inputs(x, weight, bias)
        checks.instance("x", x, mx.array)
        if not 2 <= x.ndim <= 4:
            raise ValueError(
                f"Expected input tensor to have 2, 3 or 4 dimensions, but got {x.ndim}"
            )
        checks.number_of_channels(x.shape[-1], self.num_features, x.shape)
        if self.training and math.prod(x.shape[:-1]) == 1:
            raise ValueError("BatchNorm training requires more than one value per channel.")
        options = eps, mask, residual, self.activation
        problem, inputs = checked(x, weight, bias, -1, *options, name_of_scale="weight")
        if mean is not None and var is not None:
            check_parameters(x, problem.features, running_mean=mean, running_var=var)
        if weight is not None:
            inputs = inputs._replace(x=x.astype(mx.result_type(x.dtype, weight.dtype)))
        return problem, inputs


@lru_cache
def _over_last_axis(axes: int, eps: float, activation: str | None) -> Problem:
    return Problem((axes - 1,), checks.positive_eps(eps), activation)
