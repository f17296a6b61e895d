"""Layers by their names, in whatever holds arrays; and what is said of them."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from batchnorm.tools import inspect
from batchnorm.tools.search import found_in

A, COUNTER = np.full(3, 0.5, np.float32), np.array(7)
TORCH = {
    "weight": A,
    "bias": A,
    "running_mean": A,
    "running_var": A,
    "num_batches_tracked": COUNTER,
}
KERAS = {"gamma": A, "beta": A, "moving_mean": A, "moving_variance": A}
STATS, PARAMETERS = {"mean": A, "var": A}, {"scale": A, "bias": A}
CONVOLUTION = {"conv.weight": np.zeros((3, 3, 1, 1)), "conv.bias": A}


def under(prefix: str, arrays: Mapping[str, Any] = TORCH) -> dict[str, Any]:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


# What is in a checkpoint, and the layers in it: model, name, whose names.
CHECKPOINTS: dict[str, tuple[Mapping[Any, Any], list[tuple[str, str, str]]]] = {
    "one layer's": (TORCH, [("", "", "torch")]),
    "a state_dict": (under("layer1.0.bn1.") | CONVOLUTION, [("", "layer1.0.bn1", "torch")]),
    "other separators": (
        under("a/b/") | under("c_") | under("d.e_"),
        [("", "a.b", "torch"), ("", "c", "torch"), ("", "d.e", "torch")],
    ),
    "wrapped": ({"state_dict": under("module._orig_mod.bn.")}, [("", "bn", "torch")]),
    "a trainer's": (
        {
            "epoch": 3,
            "state_dict": under("model.bn."),
            "optimizer": {"state": {0: TORCH}, "param_groups": [{"lr": 0.1}]},
            "optimizer_states": [under("bn.")],
            "scheduler": {"last_epoch": 3},
        },
        [("", "bn", "torch")],
    ),
    "optimizer's state under another name": (
        {"model": under("bn."), "inner": {"state": {"bn": TORCH}, "param_groups": []}},
        [("", "bn", "torch")],
    ),
    "a model and its average": (
        {"model": under("bn."), "model_ema": under("module.bn.")},
        [("model", "bn", "torch"), ("model_ema", "bn", "torch")],
    ),
    "two models in wrappers": (
        {"state_dict": under("bn."), "module": under("bn.")},
        [("state_dict", "bn", "torch"), ("module", "bn", "torch")],
    ),
    "two models": (
        {"generator": under("bn."), "discriminator": under("bn.")},
        [("generator", "bn", "torch"), ("discriminator", "bn", "torch")],
    ),
    "teacher and student in one": (
        under("student.bn.") | under("teacher.bn."),
        [("student", "bn", "torch"), ("teacher", "bn", "torch")],
    ),
    "an average with underscores": (
        under("backbone.bn.") | under("ema_backbone_bn_"),
        [("", "backbone.bn", "torch"), ("ema", "backbone_bn", "torch")],
    ),
    "Flax's variables": (
        {
            "params": {"Conv_0": {"kernel": A}, "BatchNorm_0": PARAMETERS},
            "batch_stats": {"BatchNorm_0": STATS, "Block_0": {"BatchNorm_0": STATS}},
        },
        [("", "BatchNorm_0", "flax"), ("", "Block_0.BatchNorm_0", "flax")],
    ),
    "Flax's variables, flat": (
        under("params/bn/", PARAMETERS) | under("batch_stats/bn/", STATS),
        [("", "bn", "flax")],
    ),
    "a train state with its average": (
        {
            "params": {"bn": PARAMETERS},
            "batch_stats": {"bn": STATS},
            "opt_state": {"0": {"mu": {"bn": PARAMETERS}, "bn": STATS | PARAMETERS}},
            "ema": {"params": {"bn": PARAMETERS}, "batch_stats": {"bn": STATS}},
        },
        [("", "bn", "flax"), ("ema", "bn", "flax")],
    ),
    "nnx's state": (
        {"bn": {name: {"value": array} for name, array in (STATS | PARAMETERS).items()}},
        [("", "bn", "flax")],
    ),
    "Keras": (
        under("block/bn/", KERAS) | {"other/gamma:0": A, **under("last/", {**KERAS})},
        [("", "block.bn", "keras"), ("", "last", "keras")],
    ),
    "names of TensorFlow": (
        {f"bn/{name}:0": array for name, array in KERAS.items()},
        [("", "bn", "keras")],
    ),
    "a list of layers": ({"layers": [{}, TORCH]}, [("", "layers.1", "torch")]),
    "a bare mean": ({"data": STATS, "mean": A, "var": A}, []),
    "a mean without its variance": ({"bn.running_mean": A, "bn.weight": A}, []),
    "of different shapes": ({"bn.running_mean": A, "bn.running_var": A[:2]}, []),
    "numbers": ({"bn.running_mean": 0.5, "bn.running_var": 0.5}, []),
    "nothing": ({}, []),
    "a loss with a network of its own": (
        under("model.bn.") | under("loss.vgg.bn."),
        [("", "bn", "torch"), ("", "loss.vgg.bn", "torch")],
    ),
    "names that wrappers alone tell apart": (
        under("model.bn.") | under("bn."),
        [("model", "bn", "torch"), ("", "bn", "torch")],
    ),
    "wrapped within models": (
        {"model": under("model.0.bn."), "ema": under("model.0.bn.")},
        [("model", "0.bn", "torch"), ("ema", "0.bn", "torch")],
    ),
    "attention that is called ema": (
        under("ema_attention.bn."),
        [("", "ema_attention.bn", "torch")],
    ),
    "sharded modules": (
        under("_fsdp_wrapped_module.a._checkpoint_wrapped_module.bn."),
        [("", "a.bn", "torch")],
    ),
    "no optimizer": (
        {"optimal": under("optimus.bn.")} | under("optim_head.bn."),
        [("optimal", "optimus.bn", "torch"), ("", "optim_head.bn", "torch")],
    ),
    "keys of Flax's flat states": (
        {("bn", name): array for name, array in (STATS | PARAMETERS).items()},
        [("", "bn", "flax")],
    ),
    "without channels": ({"bn.running_mean": A[:0], "bn.running_var": A[:0]}, []),
    "without values": (
        {f"bn.{name}": torch.ones(3, device="meta") for name in ("running_mean", "running_var")},
        [],
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_finds(case):
    tree, expected = CHECKPOINTS[case]
    found = found_in(tree)
    named = [(each.group, each.name, each.framework) for each in found]
    assert named == expected


def test_reads_all_that_a_layer_keeps():
    tree = {name: np.arange(i, i + 3.0, dtype=np.float32) for i, name in enumerate(TORCH)}
    (layer,) = inspect(tree | {"num_batches_tracked": COUNTER}).layers
    read = (layer.scale, layer.bias, layer.mean, layer.var)
    assert [each.tolist() for each in read if each is not None] == [
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
    ]
    assert (layer.batches, layer.eps, layer.dtype, layer.momentum) == (7, 1e-5, "float32", None)
    assert {each.dtype for each in read if each is not None} == {np.dtype(np.float64)}


def test_reads_no_other_array():
    class Unread:
        shape, dtype = (3,), "float32"

        def tolist(self) -> Any:
            raise AssertionError("has been read")

    report = inspect(under("bn.") | {"conv.weight": Unread(), "ln.weight": Unread()})
    assert len(report.layers) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors(dtype):
    layer = torch.nn.BatchNorm1d(3, dtype=dtype)
    layer.running_var += 0.5
    (found,) = inspect(
        {**layer.state_dict(), "running_mean": layer.running_mean.requires_grad_()}
    ).layers
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.var.tolist() == [1.5, 1.5, 1.5]
    assert found.batches == 0


def test_arrays_of_mlx_and_jax():
    import jax.numpy as jnp
    import mlx.core as mx

    for make, kinds in ((mx.array, (mx.bfloat16, mx.float16)), (jnp.asarray, (jnp.bfloat16,))):
        for dtype in kinds:
            (found,) = inspect(
                {name: make(A, dtype) for name in ("running_mean", "running_var")}
            ).layers
            assert found.var.tolist() == [0.5, 0.5, 0.5]
            assert found.dtype in ("bfloat16", "float16")


@pytest.mark.parametrize(
    ("name", "value", "attribute"),
    [
        ("num_batches_tracked", np.zeros(0), "batches"),
        ("num_batches_tracked", np.full((), np.inf, np.float16), "batches"),
        ("weight", np.zeros((3, 3, 1, 1)), "scale"),  # of a convolution that has statistics
    ],
)
def test_what_is_no_parameter_is_left(name, value, attribute):
    (layer,) = inspect(TORCH | {name: value}).layers
    assert getattr(layer, attribute) is None


def test_names_of_keras_serve_where_they_tell_layers_apart():
    tree = {"a": {"bn": KERAS}, "b": {"bn_1": KERAS}}
    places = {("a", "bn"): {"name": "first"}, ("b", "bn_1"): {"name": "second"}}
    assert [each.name for each in found_in(tree, places)] == ["first", "second"]
    same = {place: {"name": "norm"} for place in places}
    assert [each.name for each in found_in(tree, same)] == ["a.bn", "b.bn_1"]


def test_refuses_what_is_no_mapping_or_has_no_layer():
    with pytest.raises(TypeError, match=r"mapping must be a mapping .* but got list\."):
        inspect([A])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"Looked for running_mean and running_var \(PyTorch, MLX\)"
    ):
        inspect(CONVOLUTION)


SICK = {
    "model": under("bn.", TORCH | {"running_var": np.array([1, -1, 1.0])}) | under("other."),
    "ema": under("bn.", TORCH | {"weight": np.array([1, 0, 1.0])}),
}


def test_says_it_in_text_json_and_a_table():
    report = inspect(SICK)
    assert str(report).splitlines() == [
        "severe: negative_variance",
        "  model: bn: The running variance is negative in channel 1, down to -1.",
        "  → No batch has such a variance: a conversion or an average of checkpoints has made it, "
        "or sums that cancel. Recalibrate.",
        "",
        "info: dead_channels",
        "  ema: bn: The scale is 0, or next to it, in channel 1.",
        "  → They can be pruned. If they are many, the learning rate or the weight decay of the "
        "scale was high.",
        "",
        "3 normalizations: severe in 1, info in 1.",
    ]
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["is_severe"]
    assert [each["group"] for each in told["layers"]] == ["model", "model", "ema"]
    assert told["findings"][0]["channels"] == [1]
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(report)
    lines = [line.strip() for line in captured.get().splitlines()]
    rows = [line for line in lines if line.startswith(("model: ", "ema: "))][:3]
    assert [row.split("  ")[0] for row in rows] == ["model: bn", "ema: bn", "model: other"]
    assert lines[-1] == report.summary


def test_json_holds_no_number_that_it_cannot():
    report = inspect(
        TORCH | {"running_var": np.full(3, np.nan), "running_mean": np.full(3, np.inf)}
    )
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["layers"][0]["largest_variance"] is None
    assert "nan" not in str(report.figure().get_axes())


def test_draws_every_layer():
    figure = inspect(
        {f"{i}.{key}": each for i in range(90) for key, each in TORCH.items()}
    ).figure()
    mean, variance = figure.axes
    assert [each.get_title() for each in figure.axes] == ["Running mean / std", "Running variance"]
    assert len(mean.collections[0].get_segments()) == 90
    assert len(mean.get_yticks()) == 45
    assert variance.get_xscale() == "log"


def test_names_decades_alone():
    """Within one decade matplotlib names parts of it too, over one another."""
    figure = inspect(TORCH | {"running_var": np.array([0.2, 0.3, 0.4])}).figure()
    figure.draw_without_rendering()
    parts = figure.axes[1].get_xticklabels(minor=True)
    assert parts
    assert not any(each.get_text() for each in parts)
