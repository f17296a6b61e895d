"""Every finding, in a model made sick for it, and not in healthy ones."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm.moments import Statistics
from batchnorm.tools.findings import KINDS, Finding, findings_of
from batchnorm.tools.pooling import Pooled
from batchnorm.tools.states import ONE_PASS, Seen, State

CHANNELS = 8
RANDOM = np.random.default_rng(0)


def healthy(name: str = "bn", **changed: Any) -> State:
    random = np.random.default_rng(len(name))
    state = State(
        name=name,
        framework="torch",
        mean=random.normal(0, 0.5, CHANNELS),
        var=random.uniform(0.5, 2, CHANNELS),
        scale=random.uniform(0.5, 1.5, CHANNELS),
        bias=random.normal(0, 0.1, CHANNELS),
        eps=1e-5,
        batches=1000,
        momentum=0.1,
        is_of_model=True,
        one_pass=ONE_PASS["torch"],
    )
    return replace(state, **changed)


def initial(name: str = "new", **changed: Any) -> State:
    ones, zeros = np.ones(CHANNELS), np.zeros(CHANNELS)
    values = {"mean": zeros, "var": ones, "scale": ones, "bias": zeros, "batches": 0}
    return healthy(name, **(values | changed))


def but(array: np.ndarray, **values: float) -> np.ndarray:
    """The array, but for some channels: but(x, c3=-1.0)."""
    changed = array.copy()
    for channel, value in values.items():
        changed[int(channel[1:])] = value
    return changed


def kinds(*states: State) -> list[tuple[str, str, str, tuple[int, ...]]]:
    return [(each.layer, each.kind, each.severity, each.channels) for each in findings_of(states)]


def seen(
    state: State,
    *,
    batches: int = 10,
    rows: int = 64,
    shift: float = 0,
    factor: float = 1,
    spread: float = 0,
    **more: Any,
) -> State:
    """That state after batches of its own distribution; or of another, in standard deviations."""
    random, pooled, std = np.random.default_rng(1), Pooled(CHANNELS), np.sqrt(state.var)
    for _ in range(batches):
        between = spread * random.standard_normal(CHANNELS)
        x = random.standard_normal((rows, CHANNELS)) * factor + shift + between
        x = state.mean + std * x
        pooled.add(Statistics(np.full(CHANNELS, rows), x.mean(axis=0), x.var(axis=0)))
    return replace(state, seen=Seen(pooled, pooled, **more))


BN = healthy()
TRAINED = {"scale": BN.scale, "bias": BN.bias}
ALL = tuple(range(CHANNELS))
SICK: dict[str, tuple[list[State], list[tuple[str, str, str, tuple[int, ...]]]]] = {
    "NaN in the mean": (
        [replace(BN, mean=but(BN.mean, c2=np.nan))],
        [("bn", "not_finite", "severe", (2,))],
    ),
    "infinite scale": (
        [replace(BN, scale=but(BN.mean, c1=np.inf))],
        [("bn", "not_finite", "severe", (1,))],
    ),
    "negative variance": (
        [replace(BN, var=but(BN.var, c3=-1.0, c5=-1e-9))],
        [("bn", "negative_variance", "severe", (3, 5))],
    ),
    "one layer never updated, others are": (
        [BN, initial("lost", **TRAINED)],
        [("lost", "never_updated", "severe", ())],
    ),
    "none ever updated, no counters": (
        [initial("a", batches=None, momentum=0.99, framework="flax", **TRAINED)],
        [("a", "never_updated", "warning", ())],
    ),
    "none ever updated, counters 0": (
        [initial("a", **TRAINED), initial("b", **TRAINED)],
        [("a", "never_updated", "warning", ()), ("b", "never_updated", "warning", ())],
    ),
    "absorbed, of PyTorch without counters": (
        [replace(initial("a", **TRAINED), batches=None), BN],
        [("a", "never_updated", "info", ())],
    ),
    "absorbed and frozen": (
        [initial("a", is_frozen=True, **TRAINED), BN],
        [("a", "never_updated", "info", ())],
    ),
    "a new head on a trained trunk": (
        [BN, initial("head.0"), initial("head.1")],
        [("head.0", "never_updated", "info", ())],
    ),
    "an untrained network, last scales 0": (
        [initial("a"), replace(initial("b"), scale=np.zeros(CHANNELS))],
        [("a", "never_updated", "info", ())],
    ),
    "without parameters, and left out": (
        [BN, replace(initial("a"), scale=None, bias=None)],
        [("a", "never_updated", "warning", ())],
    ),
    "ten batches": (
        [replace(BN, batches=10, var=np.linspace(0.35, 4, CHANNELS))],
        [("bn", "not_converged", "warning", ALL)],
    ),
    "sixty batches of small variances": (
        [replace(BN, batches=60, var=but(BN.var, c4=0.01))],
        [("bn", "not_converged", "warning", (4,))],
    ),
    "a constant channel": (
        [replace(BN, var=but(BN.var, c0=1e-7))],
        [("bn", "variance_below_eps", "info", (0,))],
    ),
    "constant channels": (
        [replace(BN, var=np.full(CHANNELS, 1e-7), mean=np.zeros(CHANNELS))],
        [("bn", "variance_below_eps", "warning", ALL)],
    ),
    "constant channels, and data that are more constant still": (
        [seen(replace(BN, var=np.full(CHANNELS, 1e-7), mean=np.zeros(CHANNELS)), factor=0.01)],
        [("bn", "variance_below_eps", "warning", ALL)],
    ),
    "a scale of 0": (
        [replace(BN, scale=but(BN.var, c6=-1e-8))],
        [("bn", "dead_channels", "info", (6,))],
    ),
    "most scales 0": (
        [replace(BN, scale=but(np.zeros(CHANNELS), c6=1.0))],
        [("bn", "dead_channels", "warning", (0, 1, 2, 3, 4, 5, 7))],
    ),
    "a relu that lets nothing through": (
        [seen(BN, is_positive=np.arange(CHANNELS) != 2)],
        [("bn", "dead_channels", "info", (2,))],
    ),
    "momentum of TensorFlow": (
        [replace(BN, momentum=0.9)],
        [("bn", "momentum_convention", "warning", ())],
    ),
    "momentum of PyTorch": (
        [replace(BN, framework="keras", momentum=0.1, batches=None)],
        [("bn", "momentum_convention", "warning", ())],
    ),
    "a large mean": (
        [replace(BN, mean=but(BN.mean, c1=1000.0))],
        [("bn", "float32_cancellation", "info", (1,))],
    ),
    "float16": (
        [replace(BN, dtype="float16")],
        [("bn", "half_precision_statistics", "info", ())],
    ),
    "float16, underflow": (
        [replace(BN, dtype="float16", eps=1e-6, var=but(BN.var, c1=5e-5))],
        [("bn", "half_precision_statistics", "warning", (1,))],
    ),
    "float16 in all layers": (
        [healthy(each, dtype="float16") for each in ("a", "bb", "ccc")],
        [("a", "half_precision_statistics", "info", ())],
    ),
    "constant since the beginning": (
        [replace(BN, batches=400, var=but(BN.var, c3=0.9**400))],
        [("bn", "variance_below_eps", "info", (3,))],  # and not_converged says nothing
    ),
    "bfloat16, a large mean": (
        [replace(BN, dtype="bfloat16", mean=but(BN.mean, c1=100.0))],
        [("bn", "half_precision_statistics", "warning", (1,))],
    ),
    "other data": ([seen(BN, shift=1)], [("bn", "drift", "warning", ALL)]),
    "quite other data": ([seen(BN, shift=4)], [("bn", "drift", "severe", ALL)]),
    "wider data": ([seen(BN, factor=2)], [("bn", "drift", "warning", ALL)]),
    "narrower data": ([seen(BN, factor=0.2)], [("bn", "drift", "severe", ALL)]),
    "other data, frozen": (
        [seen(replace(BN, is_frozen=True), shift=4)],
        [("bn", "drift", "info", ALL)],
    ),
    "NaN in the data": (
        [seen(healthy("later"), order=1, shift=np.nan), seen(BN, order=0, shift=np.nan)],
        [("bn", "not_finite", "severe", ALL)],
    ),
    "as DCGAN begins": (
        [initial("a", scale=1 + 0.02 * RANDOM.standard_normal(CHANNELS))],
        [("a", "never_updated", "info", ())],
    ),
    "single examples": (
        [seen(BN, batches=100, rows=2, spread=0.8)],
        [("bn", "noisy_batches", "warning", ())],
    ),
}


@pytest.mark.parametrize("case", SICK)
def test_a_sick_model(case):
    states, expected = SICK[case]
    assert kinds(*states) == expected


def test_every_kind_has_a_case():
    assert {kind for _, expected in SICK.values() for _, kind, _, _ in expected} == {*KINDS}


HEALTHY = {
    "trained": [healthy("a"), healthy("bb")],
    "last scales 0": [BN, healthy("last", scale=np.zeros(CHANNELS))],
    "pretrained, counters 0": [healthy(each, batches=0) for each in ("a", "bb")],
    "pretrained, trained on for ten batches": [
        replace(BN, batches=10, var=but(BN.var, c1=0.01))  # which started from 1 nowhere
    ],
    "momentum of None": [replace(BN, momentum=None, batches=3)],
    "ported from TensorFlow": [replace(BN, eps=1e-3, momentum=0.01, batches=None)],
    "frozen, whatever its momentum": [replace(BN, momentum=0.99, is_frozen=True)],
    "ours, large mean": [replace(BN, mean=np.full(CHANNELS, 1e4), one_pass=None)],
    "a single channel": [
        healthy(mean=np.ones(1), var=np.ones(1), scale=np.full(1, 0.3), bias=np.ones(1))
    ],
    "its own data": [seen(BN)],
    "few rows of its own data": [seen(BN, batches=2, rows=6)],
    "one batch of other data": [seen(BN, batches=1, shift=4)],
}


@pytest.mark.parametrize("case", HEALTHY)
def test_a_healthy_model(case):
    assert kinds(*HEALTHY[case]) == []


DISTRIBUTIONS = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "sparse": lambda random, shape: np.maximum(random.standard_normal(shape) - 1, 0),
    "heavy": lambda random, shape: random.lognormal(0, 1, shape),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("batches", "rows"), [(2, 8), (4, 8), (8, 8), (16, 8), (2, 128), (20, 64)])
def test_few_batches_of_a_healthy_layer_are_no_finding(distribution, batches, rows):
    """In none of 256 channels, of which the worst one would be a finding."""
    draw, channels = DISTRIBUTIONS[distribution], 256
    truth = draw(np.random.default_rng(0), (1_000_000, 1))
    ones = np.ones(channels)
    state = healthy(mean=truth.mean() * ones, var=truth.var() * ones, scale=None, bias=None)
    for seed in range(5):
        random, pooled = np.random.default_rng(seed), Pooled(channels)
        for _ in range(batches):
            x = draw(random, (rows, channels))
            pooled.add(Statistics(np.full(channels, rows), x.mean(axis=0), x.var(axis=0)))
        assert kinds(replace(state, seen=Seen(pooled, pooled))) == []


def test_one_shifted_channel_of_many_is_found():
    channels, random, pooled = 256, np.random.default_rng(0), Pooled(256)
    ones = np.ones(channels)
    state = healthy(mean=0 * ones, var=1.01 * ones, scale=None, bias=None)
    for _ in range(4):
        x = random.standard_normal((64, channels)) + (np.arange(channels) == 7)
        pooled.add(Statistics(np.full(channels, 64), x.mean(axis=0), x.var(axis=0)))
    found = kinds(replace(state, seen=Seen(pooled, pooled)))
    assert found == [("bn", "drift", "warning", (7,))]


def test_calls_of_unlike_sizes_may_fit_call_by_call():
    """A layer that is called with a large map and a small one, of which averages know no size."""
    batches, calls, ones = Pooled(CHANNELS), Pooled(CHANNELS), np.ones(CHANNELS)
    for _ in range(10):
        now = Pooled(CHANNELS)
        for count, mean in ((4096, -2.0), (64, 2.0)):
            statistics = Statistics(count * ones, mean * ones, ones)
            calls.add(statistics)
            now.add(statistics)
        batches.add(now.statistics)
    by_call = healthy(mean=0 * ones, var=1.01 * ones, seen=Seen(batches, calls))
    assert kinds(by_call) == []
    assert [kind for _, kind, _, _ in kinds(replace(by_call, mean=9 * ones))] == ["drift"]


def test_a_frozen_layer_is_no_cause():
    frozen = seen(healthy("a", is_frozen=True), shift=4)
    (severe,) = (
        x for x in findings_of([frozen, seen(healthy("z"), shift=4, order=1)]) if x.layer == "z"
    )
    assert severe.advice.startswith("Recalibrate")


def test_the_page_has_a_row_for_each_kind():
    page = (Path(__file__).parents[1] / "docs" / "tools.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*KINDS]


def test_models_are_judged_apart():
    average = [replace(initial(each, **TRAINED), group="ema") for each in ("a", "b")]
    found = findings_of([replace(BN, group="model"), *average])
    assert [(each.path, each.severity) for each in found] == [
        ("ema: a", "warning"),  # and not severe, as nothing in it has counted
        ("ema: b", "warning"),
    ]


def test_drift_names_the_layer_where_it_begins():
    second, first = seen(healthy("z"), shift=4, order=1), seen(healthy("a"), shift=2, order=0)
    by_layer: dict[str, Finding] = {each.layer: each for each in findings_of([second, first])}
    assert by_layer["z"].advice == "Look first at a, where this begins."
    assert by_layer["a"].advice.startswith("Recalibrate")


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ([3], "channel 3"),
        ([1, 2], "channels 1 and 2"),
        ([0, 1, 2, 3, 4, 5], "channels 0, 1, 2, 3, 4 and 5"),
        ([0, 1, 2, 3, 4, 5, 6], "channels 0, 1, 2, 3, 4 and 2 more"),
        (range(8), "all 8 channels"),
    ],
)
def test_channels_are_named(which, said):
    var = BN.var.copy()
    var[[*which]] = -1
    (found,) = findings_of([replace(BN, var=var)])
    assert found.sentence == f"The running variance is negative in {said}, down to -1."
