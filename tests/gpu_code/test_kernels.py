"""Each kernel by itself, given what plain formulas make of x, so that the one at fault is named."""

from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import truth
from compare import near
from gpu_code.cutting import SMALL, cut
from gpu_code.interpreter import launches

from batchnorm.definition import Inputs, Problem
from batchnorm.torch._gpu import stages, tiles
from batchnorm.torch._gpu.launching import run
from batchnorm.torch._gpu.operands import Moving
from batchnorm.torch._operations import Call
from batchnorm.torch._sync import ALONE

EPS = 1e-3
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """x of (outer, channels, inner), and what goes with it."""

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    weights: str | None = None  # of each "row", "place" in it, or "element"
    activation: str | None = None
    residual: bool = False
    size: float = 1.0
    mean: float = 3.0
    std: float = 2.0

    def __str__(self) -> str:
        return self.name

    @cached_property
    def _random(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64)

    @cached_property
    def inputs(self) -> Inputs:
        _, channels, _ = self.shape
        x = ((self.mean + self.std * self._normal(*self.shape)) * self.size).to(self.dtype)
        scale, bias = self._normal(channels), self._normal(channels).float()
        residual = self._normal(*self.shape).to(self.dtype) if self.residual else None
        return Inputs(x, scale, bias, residual, self._weights())

    def _weights(self) -> torch.Tensor | None:
        if self.weights is None:
            return None
        outer, _, inner = self.shape
        sizes = {"row": (outer, 1, 1), "place": (outer, 1, inner), "element": self.shape}
        shape = sizes[self.weights]
        kept = torch.rand(shape, generator=self._random) < 0.7
        return (
            kept
            if self.weights == "place"
            else kept * (0.5 + torch.rand(shape, generator=self._random))
        )

    @cached_property
    def dy(self) -> torch.Tensor:
        return self._normal(*self.shape).to(self.dtype)

    @property
    def tolerance(self) -> float:
        return {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1.6e-2}[self.dtype]

    @property
    def tolerance_of_sums(self) -> float:
        return min(self.tolerance, 5e-6)

    def operands(self):
        call = Call(Problem((1,), EPS, self.activation), ALONE, False)
        return stages.stages_by_kernels(call, self.inputs)._operands


CASES = [
    Case("rows", (300, 7, 1)),
    Case("rows of places", (90, 5, 9)),
    Case("runs", (14, 5, 70)),
    Case("long runs, bools", (3, 2, 2300), weights="place", activation="relu"),
    Case("long runs", (3, 2, 2300)),
    Case("runs, float64", (14, 3, 70), torch.float64),
    Case("rows, bfloat16, relu", (300, 7, 1), torch.bfloat16, activation="relu"),
    Case("runs, bfloat16, residual, silu", (14, 5, 70), torch.bfloat16, None, "silu", True),
    Case("rows of places, residual, relu", (90, 5, 9), activation="relu", residual=True),
    Case("rows, weights", (300, 7, 1), weights="row", activation="silu"),
    Case("rows of places, bools", (90, 5, 9), weights="place", activation="relu", residual=True),
    Case("runs, bools", (14, 5, 70), weights="place"),
    Case("runs, weights", (14, 5, 70), weights="element", activation="silu"),
    Case("rows of places, weights, float64", (60, 3, 9), torch.float64, weights="element"),
    Case("rows, far", (300, 7, 1), mean=1e4, std=0.02),
    Case("runs, far, silu", (14, 5, 70), activation="silu", mean=1e4, std=0.02),
    Case("runs, far, float64", (14, 3, 70), torch.float64, mean=1e5, std=1e-2),
    Case("rows, huge", (300, 7, 1), size=1e30),
    Case("runs, huge, weights", (14, 5, 70), weights="element", size=1e30),
    Case("runs, huge, float64", (14, 3, 70), torch.float64, size=1e200),
]
# Those whose variance is a float64.
FITTING = [case for case in CASES if case.dtype != torch.float64 or case.size == 1]
CUTS = {"large tiles": {}, "small tiles": SMALL}


@pytest.fixture(params=CUTS)
def _cut(request):
    with cut(**CUTS[request.param]):
        yield


def of(cases: list[Case]):
    def marked(test):
        return pytest.mark.usefixtures("_cut")(
            pytest.mark.parametrize("case", cases, ids=str)(test)
        )

    return marked


# ---- plain formulas, in NumPy


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.double().numpy()


def plain(case: Case) -> SimpleNamespace:
    """What a step of training makes of a case; z, g and x̂ too."""
    x, scale, bias, residual, weights = map(array, case.inputs)
    given = {"axis": 1, "eps": EPS, "activation": case.activation}
    given |= {"mask": weights, "residual": residual}
    wide = {
        name: None if each is None else each.astype(np.longdouble)
        for name, each in {"x": x, "scale": scale, "bias": bias, "dy": array(case.dy)}.items()
    }
    forward = truth.batch_norm(
        *(wide[n] for n in ("x", "scale", "bias")), **given, dtype=np.longdouble
    )
    gradients = truth.batch_norm_gradients(
        *(wide[n] for n in ("dy", "x", "scale", "bias")), **given, dtype=np.longdouble
    )
    count = np.broadcast_to(forward.count, forward.mean.shape)
    rstd = 1 / np.sqrt(forward.var + EPS)
    return SimpleNamespace(
        x=wide["x"],
        scale=scale,
        bias=bias,
        y=forward.y,
        count=count,
        mean=forward.mean,
        var=forward.var,
        rstd=rstd,
        g=gradients["residual"],
        gradients=gradients,
        weights=np.broadcast_to(1.0 if weights is None else weights, x.shape),
    )


def table_of(case: Case, found: SimpleNamespace) -> torch.Tensor:
    """CENTER, FIRST, SLOPE, SHIFT, RHO, REMAINDER and INVERSE_COUNT, as kernels.py has them."""
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    rho = 2 * found.rstd
    center = as_tensor(found.mean / 2, dtype)
    remainder = found.mean / 2 - center.double().numpy()
    rows = [
        *(center, np.ones_like(rho), found.scale * rho, found.bias - remainder * found.scale * rho),
        *(rho, remainder * rho, 1 / found.count),
    ]
    return torch.stack([as_tensor(each, dtype) for each in rows])


def as_tensor(values, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.float64)).to(dtype)


def sets_of(case: Case, sums: tiles.Sums):
    """(place in the partial sums, slices of x) of each set."""
    outer, channels, inner = case.shape
    for split in range(sums.splits):
        row = split // sums.column_splits * sums.rows_each
        rows = slice(row, min(row + sums.rows_each, outer))
        if sums.runs:
            column = split % sums.column_splits * sums.columns_each
            columns = slice(column, min(column + sums.columns_each, inner))
            for channel in range(channels):
                yield (channel, split), (rows, channel, columns)
        else:
            for column in range(channels * inner):
                place = column % inner
                yield (column, split), (rows, column // inner, slice(place, place + 1))


def unit_of(case: Case) -> float:
    return 2.0**-540 if case.dtype == torch.float64 else 2.0**-80


def launch(given, *programs) -> None:
    with launches() as launched:
        assert run(CPU, programs)
    assert len(launched) == len(programs)


# ---- what they are cut into


def test_cases_are_cut_in_all_ways():
    found = set()
    for case in CASES:
        with cut(**SMALL):
            sums, merged = case.operands().plan._sums, tiles.MERGED
            found.add((sums.runs, sums.splits > 1, sums.column_splits > 1, sums.blocks > 1))
            assert sums.rows_each > sums.rows or sums.columns_each > sums.columns
            assert case.operands().plan._sets > merged
            writes = tiles.writes(case.operands().plan.layout.shape, case.dtype.itemsize)
            assert writes.programs > 1
            assert writes.rows_each > writes.rows
    assert {runs for runs, *_ in found} == {True, False}
    assert any(columns for _, _, columns, _ in found)


# ---- forward


@of(CASES)
def test_moments(case: Case):
    given, found = case.operands(), plain(case)
    partial = given.new_partial_sums(3 if case.weights is None else 4).fill_(torch.nan)
    launch(given, given.plan.moments.on(given.x, given.weights, partial))
    partial = partial.double().numpy().astype(np.longdouble)
    assert np.isfinite(partial).all()
    assert (partial[2] < 0).any() == (case.size > 1)
    for place, slices in sets_of(case, given.plan._sums):
        x, w = found.x[slices], found.weights[slices].astype(np.longdouble)
        pivot, first, second, *count = partial[(slice(None), *place)]
        unit = unit_of(case) if second < 0 else 1.0
        counted = x[w > 0] * unit
        if counted.size:
            slack = 1e-6 * abs(counted).max()
            assert counted.min() - slack <= pivot <= counted.max() + slack, "the pivot is no mean"
        t = np.where(w > 0, x * unit - pivot, 0)
        wanted = [(w * t).sum(), (w * t * t).sum()]
        sizes = [(w * abs(t)).sum(), wanted[1]]
        for one, other, size in zip((first, abs(second)), wanted, sizes, strict=True):
            assert abs(one - other) <= case.tolerance_of_sums * size
        if count:
            assert abs(count[0] - w.sum()) <= case.tolerance_of_sums * w.sum()


@of(CASES)
def test_merge_moments(case: Case):
    given, found = case.operands(), plain(case)
    sums, weighted = given.plan._sums, case.weights is not None
    partial = np.zeros(given.plan.partial_sums(3 + weighted), np.longdouble)
    for place, slices in sets_of(case, sums):
        x, w = found.x[slices], found.weights[slices]
        unit = unit_of(case) if case.size > 1 else 1.0
        t = float(x.flat[0] * unit)  # any pivot of some precision
        pivot = float(np.float32(t)) if given.plan.dtype == torch.float32 else t
        t = x * unit - pivot
        second = (w * t * t).sum()
        entries = [pivot, (w * t).sum(), -second if unit < 1 else second, w.sum()]
        partial[(slice(None), *place)] = entries[: 3 + weighted]
    statistics, table = given.new_statistics(3), given.new_table()
    running = [torch.full((case.shape[1],), value) for value in (5.0, 2.0)]
    batches = torch.tensor(3)
    launch(
        given,
        given.plan.merge_moments.on(
            *(as_tensor(partial, given.plan.dtype), statistics, table, *running, batches),
            *(given.scale, given.bias),
            numbers=(0.25, EPS),
        ),
    )
    check_statistics(case, found, statistics)
    check_table(case, found, table)
    check_running(case, found, running, (5.0, 2.0))
    assert batches == 4


def check_statistics(case: Case, found: SimpleNamespace, statistics: torch.Tensor) -> None:
    tolerance = 5e-6 if case.dtype != torch.float64 else 1e-12
    for got, wanted in zip(statistics, (found.count, found.mean, found.var), strict=True):
        if (wanted > 1e308).any():  # a variance beyond float64
            assert got.isinf().all()
            continue
        largest = float(abs(wanted).max())
        near(got / largest, (wanted / largest).astype(np.float64), tolerance)


def check_table(case: Case, found: SimpleNamespace, table: torch.Tensor) -> None:
    tolerance = 5e-6 if case.dtype != torch.float64 else 1e-12
    center, first, slope, shift, rho, remainder, inverse = table.double().numpy()
    size = float(abs(found.mean).max())
    near((center + remainder / rho) / size, (found.mean / 2 / size).astype(float), tolerance)
    for got, wanted in (
        (rho, 2 * found.rstd),
        (first * slope, 2 * found.rstd * found.scale),
        (inverse, 1 / found.count),
    ):
        size = float(abs(wanted).max())
        near(got / size, (wanted / size).astype(float), tolerance)
    near(shift + remainder * first * slope / rho, found.bias, tolerance)


def check_running(case, found, running, before) -> None:
    unbiased = found.var * found.count / (found.count - 1)
    for got, old, new in zip(running, before, (found.mean, unbiased), strict=True):
        wanted = 0.75 * old + 0.25 * new
        if case.size > 1e100 or (case.size > 1 and old == 2.0):  # beyond float32
            assert (np.isinf(got.numpy()) == (abs(wanted) > 3.4e38)).all()
        else:
            size = float(abs(wanted).max())
            near(got.double() / size, (wanted / size).astype(float), 5e-6)


@of(FITTING)
def test_coefficients(case: Case):
    given, found = case.operands(), plain(case)
    table = given.new_table()
    mean, var, count = (
        as_tensor(each, torch.float64) for each in (found.mean, found.var, found.count)
    )
    launch(given, given.table_of(table, mean, var, count))
    check_table(case, found, table)
    launch(given, given.table_of(table, mean, var, None))
    near(table[-1], np.ones(case.shape[1]))


@pytest.mark.parametrize("channels", [5, 2500])
@pytest.mark.parametrize("batch", ["finite", "NaN", "infinite", "empty", "one empty channel"])
@pytest.mark.parametrize("skips", [True, False])
def test_running(channels: int, batch: str, skips: bool):
    case = Case("", (4, channels, 1))
    given, random = case.operands(), np.random.default_rng(0)
    statistics = random.uniform(1.5, 9, (3, channels))
    spoilt = {"NaN": (1, np.nan), "infinite": (2, np.inf)}
    if batch in spoilt:
        row, value = spoilt[batch]
        statistics[row, -1] = value
    statistics[0, {"empty": slice(None), "one empty channel": slice(1)}.get(batch, slice(0))] = 0
    before = [random.normal(size=channels).astype(np.float32) for _ in range(2)]
    running = [torch.from_numpy(each.copy()) for each in before]
    batches, skipped = torch.tensor(3), torch.tensor(7) if skips else None
    launch(
        given,
        given.plan.running.on(
            torch.from_numpy(statistics), *running, batches, skipped, numbers=(0.25,)
        ),
    )
    is_skipped = skips and batch in spoilt
    if skips:
        assert skipped == 7 + is_skipped
    assert batches == 3 + (not is_skipped and batch != "empty")
    count, mean, var = statistics
    moves = (count > 1) & (not is_skipped)
    for got, old, new in zip(
        running, before, (mean, var * count / np.where(moves, count - 1, 1)), strict=True
    ):
        near(got, np.where(moves, 0.75 * old + 0.25 * new, old), 1e-6)


@of(CASES)
def test_normalize(case: Case):
    given, found = case.operands(), plain(case)
    y = torch.full_like(given.x, torch.nan)
    launch(given, given.normalize(table_of(case, found), y))
    near(y, found.y.astype(float), case.tolerance)


# ---- backward


def half_of(case: Case, found: SimpleNamespace) -> np.ndarray:
    """u, whose center is rounded."""
    center = table_of(case, found)[0].double().numpy()
    return found.x / 2 - center[:, None]


@of(CASES)
@pytest.mark.parametrize("keeps", [True, False])
def test_gradient_sums(case: Case, keeps: bool):
    given, found = case.operands(), plain(case)
    table, partial = table_of(case, found), given.new_partial_sums(2).fill_(torch.nan)
    g = torch.full_like(given.x, torch.nan) if keeps else None
    launch(
        given,
        given.plan.gradient_sums.on(
            *(given.x, case.dy, given.residual, given.weights, table, g, partial)
        ),
    )
    if keeps:
        near(g, found.g.astype(float), case.tolerance)
    u = half_of(case, found) * np.minimum(2 * found.rstd, 1)[:, None]
    for place, slices in sets_of(case, given.plan._sums):
        one = found.g[slices]
        for got, terms in zip(partial[(slice(None), *place)], (one, one * u[slices]), strict=True):
            size = max(abs(terms).sum(), 1e-3)
            assert abs(float(got) - terms.sum()) <= 4 * case.tolerance_of_sums * size


def sums_of(found: SimpleNamespace) -> list[np.ndarray]:
    return [found.gradients[name] for name in ("bias", "scale")]


@of(CASES)
def test_merge_sums(case: Case):
    given, found = case.operands(), plain(case)
    table, u = table_of(case, found), half_of(case, found)
    partial = np.zeros(given.plan.partial_sums(2))
    reduced = np.minimum(2 * found.rstd, 1)[:, None]
    for place, slices in sets_of(case, given.plan._sums):
        g = found.g[slices]
        partial[(slice(None), *place)] = g.sum(), (g * (u * reduced)[slices]).sum()
    sums, shares = given.new_statistics(2), given.new_table(2)
    dscale, dbias = torch.empty_like(given.scale), torch.empty_like(given.bias)
    launch(
        given,
        given.plan.merge_sums.on(
            *(as_tensor(partial, given.plan.dtype), table, sums, dscale, dbias, shares)
        ),
    )
    # What has cancelled in a sum is as much as a rounding of its terms.
    size = abs(found.g).sum((0, 2)) * 3
    for got, name in ((sums[0], "bias"), (dbias, "bias"), (sums[1], "scale"), (dscale, "scale")):
        wanted, tolerance = (
            found.gradients[name],
            case.tolerance_of_sums if got.dtype == torch.float64 else 5e-6,
        )
        near(got.double().numpy() / size, (wanted / size).astype(float), tolerance)
    check_shares(case, found, shares, size, 1)


def check_shares(case: Case, found: SimpleNamespace, shares: torch.Tensor, size, scale) -> None:
    factor = scale / (1 if case.weights else found.count)
    for got, wanted in zip(shares, sums_of(found), strict=True):
        near(
            got.double().numpy() / (factor * size).astype(float),
            (wanted / size).astype(float),
            case.tolerance_of_sums,
        )


@of(CASES)
def test_shares(case: Case):
    """Of sums that are `scale` times as much already, as several processes' are."""
    given, found = case.operands(), plain(case)
    sums = torch.stack([as_tensor(each * found.scale, torch.float64) for each in sums_of(found)])
    shares = given.new_table(2)
    launch(given, given.shares_of(sums, table_of(case, found), shares))
    check_shares(case, found, shares, abs(found.g).sum((0, 2)) * 3, found.scale)


@of(CASES)
@pytest.mark.parametrize("way", ["of dy", "of g", "by scaled sums", "by given"])
def test_input_gradient(case: Case, way: str):
    given, found = case.operands(), plain(case)
    dx, shares, wanted = torch.full_like(given.x, torch.nan), None, found.gradients["x"]
    factor = found.scale * found.rstd
    if way == "by given":
        wanted = found.g * factor[:, None]
    else:
        scale = found.scale if way == "by scaled sums" else 1
        of_each = scale / (1 if case.weights else found.count)
        shares = torch.stack(
            [as_tensor(each * of_each, given.plan.dtype) for each in sums_of(found)]
        )
    coefficients = (given.weights, table_of(case, found), shares)
    dy, residual = case.dy, given.residual
    if way == "of g":
        dy, residual = as_tensor(found.g, torch.float64).to(case.dtype), None
    programs = given.plan.input_gradient(way == "of g", way == "by scaled sums")
    launch(given, programs.on(given.x, dy, residual, *coefficients, dx))
    check_input_gradient(case, dx, wanted)


def check_input_gradient(case: Case, dx: torch.Tensor, wanted: np.ndarray) -> None:
    size = abs(wanted).max()
    near(dx.double().numpy() / float(size), (wanted / size).astype(float), 2 * case.tolerance)


# ---- where all of a channel fits one program


@pytest.mark.parametrize("case", FITTING, ids=str)
def test_forward(case: Case):
    with cut(in_one_kernel=True):
        given, found = case.operands(), plain(case)
        y, statistics, table = (
            torch.full_like(given.x, torch.nan),
            given.new_statistics(3),
            given.new_table(),
        )
        running = [torch.full((case.shape[1],), value) for value in (5.0, 2.0)]
        batches = torch.tensor(3)
        launch(given, *given.forward(y, statistics, table, Moving(*running, batches, 0.25)))
    near(y, found.y.astype(float), case.tolerance)
    check_statistics(case, found, statistics)
    check_table(case, found, table)
    check_running(case, found, running, (5.0, 2.0))
    assert batches == 4


@pytest.mark.parametrize("case", FITTING, ids=str)
@pytest.mark.parametrize("of_batch", [True, False])
def test_backward(case: Case, of_batch: bool):
    with cut(in_one_kernel=True):
        given, found = case.operands(), plain(case)
        dx, g = (torch.full_like(given.x, torch.nan) for _ in range(2))
        parameters = torch.empty_like(given.scale), torch.empty_like(given.bias)
        table = table_of(case, found)
        launch(given, *given.gradients(case.dy, table, of_batch, dx, g, parameters))
    near(g, found.g.astype(float), case.tolerance)
    size = float(abs(found.g).sum((0, 2)).max()) * 3
    for got, name in zip(parameters, ("scale", "bias"), strict=True):
        tolerance = case.tolerance_of_sums if got.dtype == torch.float64 else 5e-6
        near(got.double() / size, (found.gradients[name] / size).astype(float), tolerance)
    wanted = found.gradients["x"]
    if not of_batch:
        wanted = found.g * (found.scale * found.rstd)[:, None]
    check_input_gradient(case, dx, wanted)
