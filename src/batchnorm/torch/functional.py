"""`torch.nn.functional.batch_norm`, with its signature."""

from torch import Tensor

from .. import checks
from ..conventions import CONVENTIONS
from . import _derivatives
from ._arguments import (
    Number,
    check_floating,
    check_parameter,
    check_running,
    check_values,
    checked,
    fraction,
    number,
    values_of,
)
from ._operations import OF_LAYERS, Given
from ._recording import recorded, stand_in
from ._running import Running

__all__ = ["batch_norm"]

__dir__ = __all__.copy  # public names alone


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: Number = 0.1,
    eps: Number = 1e-5,
) -> Tensor:
    """Normalize the channels, axis 1, of input; in training, move the running statistics in place.

    Parameters
    ----------
    input : tensor of shape (N, C, ...)
    running_mean, running_var : tensor of shape (C,)
        May be None in training, which changes them in place, in the dtype that they have: give
        float32 ones with a float16 or bfloat16 input, as averages of that dtype stop moving.
    weight, bias : tensor of shape (C,), optional
    training : bool
        Whether to normalize by the statistics of the input.
    momentum : float within [0, 1], or tensor without axes
        The weight of the new value in the running statistics.
    eps : float, or tensor without axes

    Returns
    -------
    tensor, of the shape, dtype and memory format of input

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, or of a wrong type or shape.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import functional
    >>> mean, var = torch.zeros(2), torch.ones(2)
    >>> x = torch.tensor([[1.0, 20.0], [3.0, 60.0]])
    >>> print(functional.batch_norm(x, mean, var, training=True).round(decimals=3))
    tensor([[-1., -1.],
            [ 1.,  1.]])
    >>> print(mean)
    tensor([0.2000, 4.0000])
    """
    if stand_in(input, running_mean, running_var, weight, bias, momentum, eps) is not None:
        places = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        recording: Tensor = recorded(batch_norm, *places)
        return recording
    check_floating("input", input)
    if input.ndim < 2:  # as torch.nn says it
        raise ValueError(f"expected at least 2D input (got {input.ndim}D input)")
    for name, value in {
        "weight": weight,
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }.items():
        if value is not None:
            check_parameter(name, value, input, (1,), x_name="input")
    call, inputs = checked(input, weight, bias, 1, eps, None, None, None, names=OF_LAYERS)
    check_running(running_mean, running_var)
    given = None
    if running_mean is not None and running_var is not None:
        given = Given(running_mean, running_var)
    if not checks.boolean("training", training):
        if given is None:
            raise ValueError(
                "Expected running_mean and running_var to be defined when training=False"
            )
        return _derivatives.normalize(call, inputs, given)
    rate = CONVENTIONS["torch"].rate(number(momentum, fraction["momentum"]))
    check_values(values_of(call, inputs), input.shape)
    running = None if given is None else Running(*given, None, rate)
    return _derivatives.training_step(call, inputs, running)
