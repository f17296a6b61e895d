"""The layers of torch.nn, with its constructors, its state_dict keys and its messages."""

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..conventions import CONVENTIONS
from ..documentation import completed
from . import _compat
from ._arguments import Number, check_settings, check_tensor
from ._layer import Layer, without_bias
from ._recording import stand_in
from ._sync import ALONE, Alone, Group, Processes, path_of, processes_of

_Class = TypeVar("_Class")
_CONVENTION = CONVENTIONS["torch"]

_COMMON = """
`torch.nn.{name}`: batch normalization of {shapes}.

Its state_dict is torch.nn's, and so are its defaults and what it computes, up to rounding.
An empty batch leaves everything as it is. Running statistics are float32 at least: in a layer
of float16 or bfloat16, which averages of that dtype would not follow, and through half(),
bfloat16() and to().

Parameters
----------
num_features : int
    How many channels the input has, C.
eps : float, or tensor without axes
    Added to the variance, inside the root; within [1e-37, 1e30].
momentum : float within [0, 1], tensor without axes, or None
    The weight of a batch in the running statistics. None: they are the average of all batches, each
    of which weighs by how many elements it has.
affine : bool
    Whether there are parameters: a weight, which multiplies each channel, and a bias, added to it.
track_running_stats : bool
    Whether there are running statistics, which training moves and evaluation normalizes by;
    without them a batch is always normalized by its own.
process_group : torch.distributed.ProcessGroup, optional
    The processes whose batches are normalized as one; all where there is none.
device, dtype : optional
    Of parameters and running statistics; those that torch.empty takes without them.
bias : bool, keyword only
    With affine=True: whether there is a bias.
activation : None, "relu" or "silu", keyword only
    Applied to the output, in the same pass over memory.
skip_nonfinite : bool, keyword only
    Let a batch with NaN or infinity leave the running statistics as they are, to the bit; the
    buffer `num_batches_skipped` counts such batches.

Raises
------
TypeError, ValueError
    If an argument is of a wrong type or out of range.
"""


def _documented(shapes: str) -> Callable[[type[_Class]], type[_Class]]:
    """Complete the docstring of a layer from what they have in common."""

    def with_docstring(kind: type[_Class]) -> type[_Class]:
        kind.__doc__ = completed(kind, _COMMON.format(name=kind.__name__, shapes=shapes))
        return kind

    return with_docstring


@_documented("(N, C) or (N, C, L)")
class BatchNorm1d(Layer, torch.nn.BatchNorm1d):
    """...

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import BatchNorm1d
    >>> layer = BatchNorm1d(2, activation="relu")
    >>> print(layer(torch.tensor([[1.0, 20.0], [3.0, 60.0]])).detach().round(decimals=3))
    tensor([[0., 0.],
            [1., 1.]])
    >>> print(layer.running_mean)
    tensor([0.2000, 4.0000])
    """

    stands_for: type[torch.nn.Module] = torch.nn.BatchNorm1d


@_documented("(N, C, H, W)")
class BatchNorm2d(Layer, torch.nn.BatchNorm2d):
    """...

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import BatchNorm2d
    >>> x = torch.randn(2, 3, 8, 8)
    >>> block = BatchNorm2d(3, activation="relu")
    >>> y = block(x, residual=x, mask=torch.ones(2, 1, 8, 8))
    """

    stands_for: type[torch.nn.Module] = torch.nn.BatchNorm2d


@_documented("(N, C, D, H, W)")
class BatchNorm3d(Layer, torch.nn.BatchNorm3d):
    """...

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import BatchNorm3d
    >>> y = BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4))
    """

    stands_for: type[torch.nn.Module] = torch.nn.BatchNorm3d


@_documented("(N, C, ...), over processes")
class SyncBatchNorm(Layer, torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d):
    """... It is on any device.

    It takes the inputs of BatchNorm1d, BatchNorm2d and BatchNorm3d, and is an instance of each, so
    that a program which looks for these finds it. It is none of torch.nn.SyncBatchNorm, all
    instances of which DistributedDataParallel refuses on a CPU.

    It normalizes (N, C, ...) as one process would normalize all the processes' batches joined,
    exactly, however many elements each has, none included; and so are its gradients those of the
    sum of the processes' losses, to any order. Forward, a training step adds up 3 float64 numbers
    of each channel and process, and 3 of each process; backward, 2 of each channel. In evaluation,
    with one process and without torch.distributed there is nothing to share, and it works like the
    other layers.

    The processes wait for each other: each must do the same steps, forward and backward, in the
    same mode. One that has no data calls the layer with an empty batch. One whose backward pass
    does not come to the layer (its loss does not depend on the output, or neither its input nor the
    layer's parameters require a gradient) keeps the others waiting.

    Raises
    ------
    ValueError
        In training, if all processes together have one value of each channel.
    RuntimeError
        In a call or a backward pass, if another process of the group does not take part: after the
        group's timeout, as far as its backend tells, naming this layer and its step (unless
        DistributedDataParallel, which broadcasts buffers first, misses it first). In a call on the
        CPU, if another process calls another layer of the model, or has another eps.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import SyncBatchNorm
    >>> y = SyncBatchNorm(3)(torch.randn(4, 3))
    """

    stands_for: type[torch.nn.Module] = torch.nn.SyncBatchNorm

    # Where it is in the model that called it first: a backward pass no longer knows. And that as a
    # number, by which processes know whether they are at the same layer.
    _path: str | None = None
    _place: int = 0

    _check_input_dim = _compat.check_input_of_sync

    def __init__(
        self,
        num_features: int,
        eps: Number = _CONVENTION.eps,
        momentum: Number | None = _CONVENTION.momentum,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Group | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        settings = (eps, momentum, affine, track_running_stats, device, dtype)
        added: Any = {"bias": bias, "activation": activation, "skip_nonfinite": skip_nonfinite}
        super().__init__(num_features, *settings, **added)
        self.process_group = process_group

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Group | None = None
    ) -> torch.nn.Module:
        """As that of torch.nn.SyncBatchNorm: ``convert(module, sync=process_group or True)``.

        Parameters
        ----------
        module : torch.nn.Module
            Changed in place, unlike there.
        process_group : torch.distributed.ProcessGroup, optional
            The processes whose batches are normalized as one; all by default.

        Returns
        -------
        torch.nn.Module
            The same module.

        Raises
        ------
        TypeError, ValueError
            As in `convert`.
        """
        from .conversion import convert

        return convert(module, sync=True if process_group is None else process_group)

    def _processes(self) -> Alone:
        if not self.training and self.normalize_by is None and self.update_running is None:
            return ALONE
        processes = processes_of(self.process_group or True, self._whereabouts)
        if isinstance(processes, Processes):
            if self._path is None and not torch.compiler.is_compiling():
                self._path = path_of(self)
                self._place = zlib.crc32(self._path.encode())
            processes.place = self._place
        return processes

    def _whereabouts(self) -> str:
        """Which layer of which model this is."""
        at = f" {self._path!r}" if self._path else ""
        if self.num_batches_tracked is None:
            return f"{type(self).__name__}{at}"
        return f"{type(self).__name__}{at} (after {int(self.num_batches_tracked)} batches)"


class _Lazy:
    """Before torch.nn's own lazy layer, whose constructor takes its arguments alone."""

    def __init__(
        self,
        eps: Number = _CONVENTION.eps,
        momentum: Number | None = _CONVENTION.momentum,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        switches = {"affine": affine, "track_running_stats": track_running_stats, "bias": bias}
        check_settings(eps, momentum, **switches)
        settings: Any = (eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*settings, **without_bias(bias))
        self._add(activation, skip_nonfinite)  # type: ignore[attr-defined]

    def initialize_parameters(self, input: Tensor, **keywords: Any) -> None:
        if stand_in(input) is not None:
            raise TypeError(
                f"torch.fx can't trace a {type(self).__name__} before its first input, which says "
                "how many channels there are. Call the model once with a tensor."
            )
        check_tensor("input", input)
        self._check_input_dim(input)  # type: ignore[attr-defined]
        is_new = self.has_uninitialized_params()  # type: ignore[attr-defined]
        super().initialize_parameters(input, **keywords)  # type: ignore[misc]
        self.widen_statistics()  # type: ignore[attr-defined]
        if is_new:
            self.start_statistics()  # type: ignore[attr-defined]


@_documented("(N, C) or (N, C, L)")
class LazyBatchNorm1d(_Lazy, torch.nn.LazyBatchNorm1d, BatchNorm1d):
    """... It takes num_features from its first input, and then is a `BatchNorm1d`.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import LazyBatchNorm1d
    >>> layer = LazyBatchNorm1d()
    >>> y = layer(torch.randn(2, 3, 4))
    >>> layer.num_features
    3
    """

    stands_for: type[torch.nn.Module] = torch.nn.LazyBatchNorm1d

    cls_to_become = BatchNorm1d


@_documented("(N, C, H, W)")
class LazyBatchNorm2d(_Lazy, torch.nn.LazyBatchNorm2d, BatchNorm2d):
    """... It takes num_features from its first input, and then is a `BatchNorm2d`.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import LazyBatchNorm2d
    >>> layer = LazyBatchNorm2d()
    >>> y = layer(torch.randn(2, 3, 4, 4))
    >>> layer.num_features
    3
    """

    stands_for: type[torch.nn.Module] = torch.nn.LazyBatchNorm2d

    cls_to_become = BatchNorm2d


@_documented("(N, C, D, H, W)")
class LazyBatchNorm3d(_Lazy, torch.nn.LazyBatchNorm3d, BatchNorm3d):
    """... It takes num_features from its first input, and then is a `BatchNorm3d`.

    Examples
    --------
    >>> import torch
    >>> from batchnorm.torch import LazyBatchNorm3d
    >>> layer = LazyBatchNorm3d()
    >>> y = layer(torch.randn(2, 3, 4, 4, 4))
    >>> layer.num_features
    3
    """

    stands_for: type[torch.nn.Module] = torch.nn.LazyBatchNorm3d

    cls_to_become = BatchNorm3d
