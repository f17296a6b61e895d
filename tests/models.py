"""Models of each library with two normalizations, one of its own and one of ours: one row each.

x goes through the library's layer, dropout, and ours, which has a relu and takes a mask. Tests of
what tools do with models speak NumPy, and run through all rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import keras
import mlx.core as mx
import mlx.nn
import numpy as np
import torch
from compare import as_numpy
from flax import nnx
from mlx.utils import tree_flatten

import batchnorm.flax.linen
import batchnorm.flax.nnx
import batchnorm.keras
import batchnorm.mlx
import batchnorm.torch
from batchnorm.flax.linen._observation import observed as observed_linen
from batchnorm.flax.nnx._observation import observed as observed_nnx
from batchnorm.keras._observation import observed as observed_keras
from batchnorm.mlx._observation import observed as observed_mlx
from batchnorm.torch._observation import observed as observed_torch

CHANNELS = 3


class Layer(NamedTuple):
    """Of a model, in NumPy's arrays."""

    path: str
    mean: np.ndarray
    var: np.ndarray


@dataclass
class Row(ABC):
    """A library.

    Attributes
    ----------
    tools : the module that has `recalibrate`
    array : to the library's array
    correction, eps : as its running variance and its layers have them
    random : draws a number from the library's global random state, if there is one
    """

    name: str
    tools: Any
    array: Any
    correction: int = 0
    eps: float = 1e-5
    random: Any = lambda: 0

    @abstractmethod
    def make(self, *, theirs: bool = True) -> Any:
        """A model in training mode; without the library's layer, ours is alone."""

    @abstractmethod
    def call(self, model, x, mask=None):
        """In the mode that the model is in, but for libraries that tell it in the call."""

    @abstractmethod
    def layers(self, model) -> list[Layer]: ...

    @abstractmethod
    def set_mean(self, model, value: float) -> None:
        """Of ours."""

    @abstractmethod
    def everything(self, model) -> str:
        """All that is to stay as it is: arrays, flags, classes."""

    @abstractmethod
    def observed(self, model, see, **keywords): ...

    def recalibrate(self, model, batches, forward=None, **keywords):
        """`forward` takes a function of x and a mask, and a batch."""
        if forward is not None:
            keywords["forward"] = lambda model, batch: forward(
                lambda *arrays: self.call(model, *arrays), batch
            )
        return self.tools.recalibrate(model, batches, progress=False, **keywords)


# ---- PyTorch


class _Torch(torch.nn.Module):
    def __init__(self, theirs):
        super().__init__()
        self.theirs = torch.nn.BatchNorm1d(CHANNELS) if theirs else None
        self.dropout = torch.nn.Dropout()
        self.ours = batchnorm.torch.BatchNorm1d(CHANNELS, activation="relu")

    def forward(self, x, mask=None):
        x = x if self.theirs is None else self.theirs(x)
        return self.ours(self.dropout(x), mask=mask)


class _TorchRow(Row):
    def make(self, *, theirs=True):
        return _Torch(theirs).train()

    def call(self, model, x, mask=None):
        return as_numpy(model(*map(torch.tensor, (x,) if mask is None else (x, mask))).detach())

    def layers(self, model):
        return [
            Layer(path, as_numpy(each.running_mean), as_numpy(each.running_var))
            for path, each in model.named_children()
            if hasattr(each, "running_mean")
        ]

    def set_mean(self, model, value):
        model.ours.running_mean.fill_(value)

    def everything(self, model):
        arrays = {name: each.tolist() for name, each in model.state_dict().items()}
        return f"{arrays}, {[(id(type(each)), vars(each)) for each in model.modules()]}"

    def observed(self, model, see, **keywords):
        return observed_torch(model, see, **keywords)


# ---- MLX


class _Mlx(mlx.nn.Module):
    def __init__(self, theirs):
        super().__init__()
        if theirs:
            self.theirs = mlx.nn.BatchNorm(CHANNELS)
        self.dropout = mlx.nn.Dropout()
        self.ours = batchnorm.mlx.BatchNorm(CHANNELS, activation="relu")

    def __call__(self, x, mask=None):
        x = self.theirs(x) if "theirs" in self else x
        return self.ours(self.dropout(x), mask=mask)


class _MlxRow(Row):
    def make(self, *, theirs=True):
        return _Mlx(theirs).train()

    def call(self, model, x, mask=None):
        return as_numpy(model(*map(mx.array, (x,) if mask is None else (x, mask))))

    def layers(self, model):
        return [
            Layer(path, as_numpy(model[path].running_mean), as_numpy(model[path].running_var))
            for path in ("theirs", "ours")
            if path in model
        ]

    def set_mean(self, model, value):
        model.ours.running_mean = value

    def everything(self, model):
        arrays = [each.tolist() for _, each in tree_flatten(model.parameters())]
        return f"{arrays}, {[(id(type(each)), vars(each)) for each in model.modules()]}"

    def observed(self, model, see, **keywords):
        return observed_mlx(model, see, **keywords)


# ---- NNX


class _Nnx(nnx.Module):
    def __init__(self, theirs):
        self.theirs = nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0)) if theirs else None
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.ours = batchnorm.flax.nnx.BatchNorm(CHANNELS, activation="relu", rngs=nnx.Rngs(0))

    def __call__(self, x, mask=None):
        x = x if self.theirs is None else self.theirs(x)
        return self.ours(self.dropout(x), mask=mask)


class _NnxRow(Row):
    def make(self, *, theirs=True):
        return _Nnx(theirs)

    def call(self, model, x, mask=None):
        return as_numpy(model(x, mask))

    def layers(self, model):
        return [
            Layer(path, as_numpy(each.mean[...]), as_numpy(each.var[...]))
            for path, each in (("theirs", model.theirs), ("ours", model.ours))
            if each is not None
        ]

    def set_mean(self, model, value):
        model.ours.mean[...] = jnp.full(CHANNELS, value)

    def everything(self, model):
        modules = [each for _, each in nnx.iter_graph(model) if isinstance(each, nnx.Module)]
        arrays = [each.tolist() for each in jax.tree.leaves(nnx.state(model, nnx.BatchStat))]
        return f"{arrays}, {[(id(type(each)), vars(each)) for each in modules]}"

    def observed(self, model, see, **keywords):
        return observed_nnx(model, see, **keywords)


# ---- Linen


class _Linen(flax.linen.Module):
    theirs: bool

    @flax.linen.compact
    def __call__(self, x, mask=None, train=False):
        if self.theirs:
            x = flax.linen.BatchNorm(name="theirs", use_running_average=not train)(x)
        x = flax.linen.Dropout(0.5, deterministic=not train)(x)
        ours = batchnorm.flax.linen.BatchNorm(name="ours", activation="relu")
        return ours(x, use_running_average=not train, mask=mask)


class _Applied:
    """A model of Linen and its variables."""

    def __init__(self, theirs):
        self.model = _Linen(theirs)
        self.variables = self.model.init(jax.random.key(0), jnp.zeros((2, CHANNELS)))


class _LinenRow(Row):
    def make(self, *, theirs=True):
        return _Applied(theirs)

    def call(self, model, x, mask=None):
        return as_numpy(model.model.apply(model.variables, x, mask))

    def layers(self, model):
        kept = model.variables["batch_stats"]
        return [
            Layer(path, as_numpy(kept[path]["mean"]), as_numpy(kept[path]["var"]))
            for path in ("theirs", "ours")
            if path in kept
        ]

    def set_mean(self, model, value):
        kept = model.variables["batch_stats"]
        kept["ours"] = {**kept["ours"], "mean": jnp.full(CHANNELS, value)}

    def everything(self, model):
        return str(jax.tree.map(lambda each: each.tolist(), model.variables))

    def observed(self, model, see, **keywords):
        return observed_linen(see, **keywords)

    def recalibrate(self, model, batches, forward=None, **keywords):
        def apply(variables, batch):
            def call(x, mask=None):
                return model.model.apply(variables, x, mask)

            return call(batch) if forward is None else forward(call, batch)

        if forward is not None:
            batches = [(each,) for each in batches]  # of which the first element is taken
        model.variables = self.tools.recalibrate(
            apply, model.variables, batches, progress=False, **keywords
        )


# ---- Keras


class _Keras(keras.Model):
    def __init__(self, theirs):
        super().__init__()
        self.theirs = keras.layers.BatchNormalization(name="theirs") if theirs else None
        self.dropout = keras.layers.Dropout(0.5)
        self.ours = batchnorm.keras.BatchNormalization(name="ours", activation="relu")

    def call(self, x, training=False, where=None):
        x = x if self.theirs is None else self.theirs(x, training=training)
        return self.ours(self.dropout(x, training=training), training=training, mask=where)


class _KerasRow(Row):
    def make(self, *, theirs=True):
        model = _Keras(theirs)
        model(np.zeros((2, CHANNELS), np.float32))
        return model

    def call(self, model, x, mask=None):
        mask = None if mask is None else mask[:, 0]
        return as_numpy(model(x, training=False, where=mask))

    def layers(self, model):
        return [
            Layer(each.path, as_numpy(each.moving_mean.value), as_numpy(each.moving_variance.value))
            for each in (model.theirs, model.ours)
            if each is not None
        ]

    def set_mean(self, model, value):
        model.ours.moving_mean.assign(np.full(CHANNELS, value))

    def everything(self, model):
        arrays = {each.path: each.value.tolist() for each in model.variables}
        layers = (model.theirs, model.dropout, model.ours)
        flags = [(id(type(each)), sorted(vars(each))) for each in layers if each]
        return f"{arrays}, {flags}"

    def observed(self, model, see, **keywords):
        return observed_keras(model, see, **keywords)


ROWS = [
    _TorchRow("torch", batchnorm.torch, torch.tensor, 1, random=lambda: torch.rand(()).item()),
    _MlxRow("mlx", batchnorm.mlx, mx.array, 1, random=lambda: mx.random.uniform().item()),
    _NnxRow("nnx", batchnorm.flax.nnx, jnp.asarray),
    _LinenRow("linen", batchnorm.flax.linen, jnp.asarray),
    _KerasRow("keras", batchnorm.keras, np.asarray, 0, 1e-3),
]
