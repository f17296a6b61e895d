"""What the layers have in common."""

import inspect
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, Literal, NoReturn, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer

from .. import checks
from ..activations import activate
from ..conventions import CONVENTIONS
from ..definition import Inputs, Problem
from . import _compat, _derivatives, _gpu, _native
from ._arguments import (
    Number,
    check_device,
    check_running,
    check_settings,
    check_tensor,
    check_values,
    fraction,
    number,
    residual_like,
    weights_of,
)
from ._opacus import tell_opacus
from ._operations import OF_LAYERS, Call, Given
from ._recording import recorded_layer, stand_in
from ._running import Running, Tracked
from ._sync import ALONE, Alone, Processes

NormalizeBy = Literal["batch", "running"]

_Class = TypeVar("_Class")
_CONVENTION = CONVENTIONS["torch"]
BEYOND_TORCH = ("activation", "skip_nonfinite", "normalize_by", "update_running")
_RUNNING = ("running_mean", "running_var")
_TENSORS = ("weight", "bias", *_RUNNING)
# What of torch.nn and timm puts layers of theirs in the place of every batch normalization.
_UNDOING = ("convert_sync_batchnorm", "freeze_batch_norm_2d", "unfreeze_batch_norm_2d")
_INITIAL = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0, "num_batches_skipped": 0}


class Layer(_compat.BatchNormBase):
    """What the layers have in common; each is an instance of a class of torch.nn as well.

    Attributes
    ----------
    activation : None, "relu" or "silu"
    skip_nonfinite : bool
    normalize_by, update_running
        What `freeze` was given; None where training and evaluation decide.
    """

    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    num_batches_skipped: Any
    activation: str | None = None
    skip_nonfinite: bool = False
    normalize_by: NormalizeBy | None = None
    update_running: bool | None = None
    # With momentum=None, which weighs batches by their elements; None until that is needed.
    _tracked: Tracked | None = None
    # The class that `convert` makes such a layer of, and `revert` makes it again.
    stands_for: type[torch.nn.Module]

    def __init__(
        self,
        num_features: int,
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
        if not isinstance(self, LazyModuleMixin):  # which takes 0 until its first input
            checks.positive_integer("num_features", num_features)
        switches = {"affine": affine, "track_running_stats": track_running_stats, "bias": bias}
        check_settings(eps, momentum, **switches)
        settings: Any = (eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(num_features, *settings, **without_bias(bias))
        self._add(activation, skip_nonfinite)

    def _add(self, activation: str | None, skip_nonfinite: bool) -> None:
        """What these layers have and torch.nn's have not."""
        tell_opacus(type(self))
        self.activation = checks.activation(activation)
        self.skip_nonfinite = checks.boolean("skip_nonfinite", skip_nonfinite)
        if skip_nonfinite:
            skipped = (
                torch.zeros_like(self.num_batches_tracked) if self.track_running_stats else None
            )
            self.register_buffer("num_batches_skipped", skipped, persistent=False)
        self.widen_statistics()

    def widen_statistics(self, before: dict[str, Tensor | None] | None = None) -> None:
        """Keep running statistics in float32 at least, with the values that they had before.

        In float16 or bfloat16, an average stops where a step rounds to nothing.
        """
        for name in _RUNNING:
            each = self._buffers.get(name)
            if each is None or isinstance(each, UninitializedBuffer):
                continue
            if each.is_floating_point() and each.itemsize < torch.float32.itemsize:
                wide = each.float()
                exact = None if before is None else before[name]
                if exact is not None and not exact.is_meta:
                    wide.copy_(exact)
                self._buffers[name] = wide

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What half(), to() and the like do, also those of a model that the layer is in."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self.widen_statistics(before)
        # In new memory there is nothing that freezing keeps.
        self.start_statistics(
            name for name, each in before.items() if each is not None and each.is_meta
        )
        return self

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        tell_opacus(type(self))

    @property
    def eps(self) -> Any:
        """Added to the variance, inside the root.

        Raises
        ------
        RuntimeError
            If the layer has what torch.nn's layers have not: an activation, say, or if it is
            frozen. Who reads eps builds another layer of this one, which would do without it.
            And, whatever the layer has, to what of torch.nn and timm makes layers of a model shared
            or frozen by putting others in their place. The number is ``vars(layer)["eps"]``.
        """
        beyond, frame = self.beyond_torch(), inspect.currentframe()
        asker = frame.f_back.f_code.co_name if frame and frame.f_back else ""
        if not beyond and asker not in _UNDOING:
            return vars(self)["eps"]
        layer = type(self).__name__
        if beyond:
            layer += f" with {', '.join(f'{name}={each!r}' for name, each in beyond.items())}"
        separate = ", separate_activations=True" if vars(self).get("activation") else ""
        raise RuntimeError(
            f"eps of this {layer} is asked for, as by what builds another layer of one, which "
            f"would lose {'that' if beyond else 'what is ours'} without a word. Call "
            f"batchnorm.torch.revert(model{separate}) before; or, for layers that share their "
            "batch, batchnorm.torch.convert(model, sync=True). The number alone is "
            'vars(layer)["eps"].'
        )

    @eps.setter
    def eps(self, value: Any) -> None:
        vars(self)["eps"] = value

    @staticmethod
    def usable_eps(eps: Any) -> Any:
        """The eps to compute with."""
        return eps

    def __dir__(self) -> list[str]:
        """Without eps where that can't be read: torch.jit.trace, say, asks for all that is here."""
        return [name for name in super().__dir__() if name != "eps" or not self.beyond_torch()]

    def beyond_torch(self) -> dict[str, Any]:
        """What it does, and a layer of torch.nn with the same parameters does not."""
        values = {name: getattr(self, name) for name in BEYOND_TORCH}
        return {name: each for name, each in values.items() if each != getattr(Layer, name)}

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Normalize the input: in training by the batch, else by the running statistics.

        Parameters
        ----------
        input : tensor, its channels in axis 1
        residual : tensor that broadcasts to input, optional
            Added before the activation.
        mask : tensor that broadcasts to input, optional
            Which elements count in the statistics, as bools or weights >= 0; in the shape
            (N, 1, H, W), say.
        activation : "relu" or "silu", optional
            Of this call, in the place of the layer's own.

        Returns
        -------
        tensor, of the shape, dtype and memory format of input

        Raises
        ------
        TypeError, ValueError
            If the input, residual or mask does not fit the layer, or one does not fit the other;
            if activation is something else.
        RuntimeError
            If the running statistics can't be updated inside a transformation of torch.func; or
            if another process of a `SyncBatchNorm` does not take part.
        """
        if not isinstance(input, Tensor) or residual is not None or mask is not None:
            if (proxy := stand_in(input, residual, mask)) is not None:
                others = {"residual": residual, "mask": mask, "activation": activation}
                return self._recorded(proxy, input, **others)
            check_tensor("input", input)
        if input.layout is not torch.strided or input.is_nested:
            _compat.check_dense("input", input)
        self._check_input_dim(input)
        activation = self.activation if activation is None else checks.activation(activation)
        watched = _compat.is_watched(input)
        weight, bias, mean, var = self._tensors(watched)
        given = Given(mean, var)
        is_tracked = mean is not None
        if not is_tracked or var is None:
            check_running(*given)
            self._check_freezing(self.normalize_by, self.update_running)
        by_running, moves = self._normalizes_by_running(is_tracked), self._moves_running(is_tracked)
        if watched:  # by a subclass of tensors, perhaps
            _compat.check_dense("input", input)
        if watched and by_running and not moves and self._is_exported():
            return self._exported(input, residual, activation)
        if watched and _compat.is_traced() and torch.onnx.is_in_onnx_export():
            raise RuntimeError(self._why_not_exported(is_tracked))
        inputs = Inputs(input, weight, bias, residual, None)
        call, inputs = self._checked(inputs, mask, given, watched, activation)
        # An empty batch says nothing; one that checkpointing computes again, nothing new.
        is_empty = input.numel() == 0 and not call.processes.is_shared
        moves = moves and not is_empty and not _compat.is_in_backward_pass()
        if by_running:
            by = given
            if moves and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                by = Given(*map(_compat.kept, given))  # as they were, in the backward pass
            y = _derivatives.normalize(call, inputs, by)
            if moves:
                with torch.no_grad():
                    statistics = _derivatives.batch_statistics(call, inputs)
                self._move_running(call, inputs, given, statistics)
            return y
        values = input.numel() // (input.shape[1] or 1)
        if isinstance(call.processes, Processes):
            where = " here, and all processes of the group together have 1"
            call.processes.need_values(values, partial(check_values, 1, input.shape, where))
        else:
            check_values(values, input.shape)
        if moves and self.momentum is None:
            y, statistics = _derivatives.forward(call, inputs)
            self._move_running(call, inputs, given, statistics)
            return y
        running = self._running(call, inputs, given, self._rate()) if moves else None
        return _derivatives.training_step(call, inputs, running)

    def _recorded(self, proxy: Any, input: Any, **others: Any) -> Any:
        others = {name: each for name, each in others.items() if each is not None}
        forward = type(self).forward
        is_ours = forward.__module__.startswith(f"{__package__}.") and "forward" not in vars(self)
        return recorded_layer(self, proxy, None if is_ours else forward_of, input=input, **others)

    def freeze(
        self, *, normalize_by: NormalizeBy | None = "running", update_running: bool | None = False
    ) -> Self:
        """Decide what statistics do from now on, whatever train() and eval() say.

        It lasts until `unfreeze`. It is a mode, as train() and requires_grad are: in copies and
        pickles, but not in a state_dict, so that a new model that loads one is to be frozen anew.
        Whether weight and bias are trained is another matter: that is their requires_grad. Running
        statistics that no batch moves are not reset either, by `reset_running_stats`,
        `reset_parameters` or the tools that call these, as `torch.optim.swa_utils.update_bn` does.

        Parameters
        ----------
        normalize_by : "running", "batch" or None
            Which statistics normalize; None: in training the batch's, else the running ones.
        update_running : bool or None
            Whether a batch moves the running statistics; None: in training.

        Returns
        -------
        The layer itself

        Raises
        ------
        ValueError
            If an argument is none of these, or if the layer keeps no running statistics.

        Examples
        --------
        >>> import torch
        >>> from batchnorm.torch import BatchNorm1d
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), BatchNorm1d(3).freeze()).train()
        >>> y = model(torch.randn(8, 4))
        >>> model[1].running_mean
        tensor([0., 0., 0.])
        """
        self._check_freezing(normalize_by, update_running)
        self.normalize_by, self.update_running = normalize_by, update_running
        return self

    def _check_freezing(self, normalize_by: Any, update_running: Any) -> None:
        for name, value, allowed in (
            ("normalize_by", normalize_by, ("running", "batch", None)),
            ("update_running", update_running, (True, False, None)),
        ):
            if not any(type(value) is type(each) and value == each for each in allowed):
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, allowed))}, but got {value!r}."
                )
        if self.running_mean is None and (normalize_by == "running" or update_running):
            raise ValueError(
                f"freeze(normalize_by={normalize_by!r}, update_running={update_running!r}) needs "
                "running statistics, but the layer has none: it was made with "
                "track_running_stats=False, or they were taken away. Call unfreeze()."
            )

    def unfreeze(self) -> Self:
        """Let train() and eval() decide again, as in a new layer."""
        self.normalize_by = self.update_running = None
        return self

    def reset_running_stats(self) -> None:
        """Give running statistics their initial values, unless `freeze` keeps them as they are."""
        if self.track_running_stats and self.update_running is not False:
            self.start_statistics()

    def start_statistics(self, names: Iterable[str] = _INITIAL.keys()) -> None:
        """Give them, of those that there are, the values with which they begin."""
        for name in _INITIAL.keys() & names:
            buffer = self._buffers.get(name)
            if not (buffer is None or isinstance(buffer, UninitializedBuffer)):
                buffer.fill_(_INITIAL[name])

    def extra_repr(self) -> str:
        added = "".join(f", {name}={value}" for name, value in self.beyond_torch().items())
        return super().extra_repr() + added

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.widen_statistics()  # which assign=True takes as they are

    def _checked(
        self,
        inputs: Inputs,
        mask: Tensor | None,
        running: Given,
        watched: bool,
        activation: str | None,
    ) -> tuple[Call, Inputs]:
        input, weight, bias, residual, _ = inputs
        dtype, shape = input.dtype, input.shape
        checks.floating("input", dtype, dtype.is_floating_point)
        if shape[1] != self.num_features and any(
            each is not None for each in (weight, bias, *running)
        ):
            checks.number_of_channels(shape[1], self.num_features, shape, "input")
        processes = self._processes()
        parameters = (weight, bias, *running)
        if watched or not (_native.fit(input, *parameters) or _gpu.fit(input, *parameters)):
            named = {"weight": weight, "bias": bias}
            named |= {"running_mean": running.mean, "running_var": running.var}
            self._check_parameters(input, named, processes)
        if residual is not None or mask is not None:
            if residual is not None:
                residual = residual_like(input, residual, "input")
            weights = None if mask is None else weights_of(input, mask, "input")
            inputs = Inputs(input, weight, bias, residual, weights)
        eps = self.usable_eps(self.__dict__["eps"])
        if type(eps) is float and processes is ALONE and not watched:
            return _plain_call(eps, activation), inputs
        eps = number(eps, checks.positive_eps)
        problem = Problem((1,), eps, activation)
        return Call(problem, processes, watched or isinstance(eps, Tensor), OF_LAYERS), inputs

    @staticmethod
    def _check_parameters(input: Tensor, named: dict[str, Tensor | None], processes: Alone) -> None:
        dtype, shape = input.dtype, input.shape
        channels = shape[1:2]
        if processes.is_shared:
            for name, each in named.items():
                if each is not None:  # before others get to know of this call
                    _compat.check_dense(name, each)
        for name, each in named.items():
            if each is None:
                continue
            try:
                fits = (each.dtype, each.device, each.shape) == (dtype, input.device, channels)
            except RuntimeError:  # of a nested tensor, which has no shape
                fits = False
            if not fits:
                _compat.check_dense(name, each)
                checks.feature_shape(name, each.shape, channels, shape, "input")
                check_device(name, each, input, "input")
                halved = each.dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16)
                if each.dtype != dtype and not halved:
                    raise TypeError(
                        f"{name} must have the dtype {dtype} of input (or torch.float32, for a "
                        f"torch.float16 or torch.bfloat16 input), but its dtype is {each.dtype}. "
                        "Convert one of them."
                    )

    def _tensors(self, watched: bool) -> tuple[Any, Any, Any, Any]:
        """The attributes of these names; torch.nn.Module takes longer to find each."""
        own, kind = self.__dict__, cast(Any, type(self))
        parameters, buffers = own["_parameters"], own["_buffers"]
        try:
            if not watched and own.keys().isdisjoint(_TENSORS) and not _hides(kind):
                weight, bias = parameters["weight"], parameters["bias"]
                return weight, bias, buffers["running_mean"], buffers["running_var"]
        except KeyError:  # one is no parameter or buffer of its own: it is parametrized, say
            pass
        return self.weight, self.bias, self.running_mean, self.running_var

    def _normalizes_by_running(self, is_tracked: bool) -> bool:
        if self.normalize_by is not None:
            return self.normalize_by == "running"
        return not self.training and is_tracked

    def _moves_running(self, is_tracked: bool) -> bool:
        if not is_tracked:
            return False
        if self.update_running is not None:
            return self.update_running
        return self.training and self.track_running_stats

    def _processes(self) -> Alone:
        return ALONE

    def _is_exported(self) -> bool:
        return _compat.is_traced() or torch.compiler.is_exporting()

    def _exported(self, input: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
        """As the operators that an exporter knows, to which eps is a number."""
        mean, eps = self.running_mean, self.usable_eps(self.__dict__["eps"])
        eps = checks.positive_eps(eps.item() if isinstance(eps, Tensor) else eps)
        # Not all kernels take parameters of another dtype than the statistics; a cast that does
        # nothing would stand in the program.
        weight, bias = (
            each if each is None or each.dtype == mean.dtype else each.to(mean.dtype)
            for each in (self.weight, self.bias)
        )
        y = F.batch_norm(input, mean, self.running_var, weight, bias, eps=eps)
        y = y if residual is None else y + residual.to(y.dtype)
        if activation is None:
            return y
        operator = getattr(F, activation, None)
        return activate(y, activation) if operator is None else operator(y)

    def _why_not_exported(self, is_tracked: bool) -> str:
        """To ONNX, by the exporter that traces."""
        if not is_tracked:
            why = "this one has no running statistics"
        elif self.normalize_by == "batch":
            why = "freeze(normalize_by='batch') is on; call unfreeze()"
        elif self.update_running:
            why = "freeze(update_running=True) is on; call unfreeze()"
        else:
            why = "this one is in training mode; call eval() on the model first"
        return (
            f"{type(self).__name__} can be exported to ONNX by tracing where it normalizes by "
            f"running statistics that stay as they are, but {why}. Or use "
            "torch.onnx.export(..., dynamo=True), which takes it as it is."
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first."""
        raise TypeError(
            f"torch.jit.script can't compile {type(self).__name__} of batchnorm.torch. Give it a "
            "copy with torch.nn's layers, batchnorm.torch.revert(copy.deepcopy(model)); or use "
            "torch.compile, torch.export or torch.jit.trace, which take the layer."
        )

    def _rate(self) -> Any:
        return _CONVENTION.rate(number(self.momentum, fraction["momentum"]))

    def _running(self, call: Call, inputs: Inputs, running: Given, rate: float | Tensor) -> Running:
        may_be_empty = self.skip_nonfinite or inputs.weights is not None or call.processes.is_shared
        skipped = self.num_batches_skipped if self.skip_nonfinite else None
        return Running(
            *(*running, self.num_batches_tracked, rate, may_be_empty, skipped),
            owner=type(self).__name__,
        )

    def _move_running(self, call: Call, inputs: Inputs, running: Given, statistics: Tensor) -> None:
        """What needs to look at the batch's statistics first."""
        if self.momentum is None:
            self._average(call, inputs, running, statistics.detach())
        else:
            moving = self._running(call, inputs, running, self._rate())
            moving.move(statistics.detach(), watched=call.watched)

    def _average(self, call: Call, inputs: Inputs, running: Given, statistics: Tensor) -> None:
        """What momentum=None does: without a number of batches nothing, as in torch.nn."""
        moving = self._running(call, inputs, running, 0.0)
        statistics, moving = moving.counted(statistics), moving._replace(skipped=None)
        batches, count = self.num_batches_tracked, statistics[0]
        if batches is None:
            moving.move(statistics, watched=call.watched)
            return
        # From where nothing is kept until the next call.
        is_apart = _compat.is_transformed() or self._is_exported()
        with torch.no_grad():
            before = batches * count
            if self._tracked is not None and not is_apart:
                before = self._tracked.elements_of(moving, count)
            elements = before + count
            rate = count / torch.where(elements == 0, 1.0, elements)
            values = (batches, *running)
            kept = Tracked(elements, *(torch.empty_like(each) for each in values))
            moving._replace(rate=rate).move(statistics, watched=call.watched)
            for each, value in zip(kept[1:], values, strict=True):
                each.copy_(value)
        # Nor is a tensor of another kind than the buffers, such as a tracer's.
        is_kept = not is_apart and type(elements) is type(batches)
        if is_kept and (call.watched or self._tracked is None or not self._tracked.take(kept)):
            self._tracked = kept


@lru_cache(maxsize=64)
def _hides(kind: type) -> bool:
    """Whether instances find one of these in their class: by a property, say."""
    return any(hasattr(kind, name) for name in _TENSORS)


@lru_cache(maxsize=64)
def _plain_call(eps: float, activation: str | None) -> Call:
    """Of a layer that computes for itself, which nothing but autograd looks at."""
    return Call(Problem((1,), checks.positive_eps(eps), activation), ALONE, False, OF_LAYERS)


def forward_of(layer: Layer, input: Tensor, **others: Any) -> Tensor:
    """Our part of a forward that a subclass or a user has given a layer."""
    return Layer.forward(layer, input, **others)


def without_bias(bias: bool) -> dict[str, Any]:
    """For a constructor of torch.nn; that of an older version, which knows none, refuses it."""
    return {} if bias else {"bias": False}
