"""The JAX door on several devices, and in several processes.

Each test runs one of the functions named `in_...` below in a process of its own, since JAX fixes
the number of devices when it starts.
"""

import json
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import truth
from cases import HARD
from compare import close, near
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from batchnorm.flax import nn
from batchnorm.jax import batch_norm, batch_statistics

DEVICES = 4
GROUPS = [[0, 2], [1, 3]]
GOLDEN = Path(__file__).parent / "golden" / "flax_nn"


def start(
    function: str,
    *arguments: str,
    module: str = "test_jax_devices",
    devices: int = DEVICES,
    quickly_compiled: bool = False,
) -> subprocess.Popen:
    program = f"import sys, {module} as tests; tests.{function}(*sys.argv[1:])"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(quickly_compiled),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> None:
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


class Problem:
    """A batch on four devices, which have from 0 to all of their elements; and the whole batch."""

    def __init__(self, masked: bool, activation: str | None) -> None:
        random = np.random.default_rng(0)
        shift = random.normal(size=(DEVICES, 1, 1, 1)) * 5
        self.x, self.dy, self.dx = (
            random.normal(size=(DEVICES, 6, 3, 5)).astype(np.float32) for _ in range(3)
        )
        self.x += shift.astype(np.float32)
        here = np.array([0.9, 0.2, 0.5, 0.0])[:, None, None, None]
        self.mask = random.uniform(size=(DEVICES, 6, 3, 1)) < (here if masked else 2)
        self.scale = random.uniform(0.5, 2, 5).astype(np.float32)
        self.bias = random.normal(size=5).astype(np.float32)
        self.masked, self.activation = masked, activation
        self.arrays = (self.x, self.mask, self.dy, self.dx)

    def derivatives(self, scale, bias, x, mask, dy, dx, *, devices=1, **sync):
        """y and its statistics; the gradients of a loss; tangents of y and of the gradients.

        Of the statistics each of the devices that share them has a loss.
        """

        def loss(scale, bias, x):
            y, statistics = batch_norm(
                x,
                scale,
                bias,
                mask=mask if self.masked else None,
                activation=self.activation,
                **sync,
            )
            of_statistics = (statistics.mean * jnp.tanh(statistics.var)).sum()
            of_y = (y * dy + y * jnp.sin(y)).sum()
            return of_y + devices * of_statistics, (y, statistics)

        gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        gradients, (y, statistics) = gradient(scale, bias, x)
        y_dot = jax.jvp(lambda x: loss(scale, bias, x)[1][0], (x,), (dx,))[1]
        second = jax.jvp(lambda x: gradient(scale, bias, x)[0], (x,), (dx,))[1]
        by_reverse = jax.grad(lambda x: (gradient(scale, bias, x)[0][2] * dx).sum())(x)
        return {
            "like x": (y, gradients[2], y_dot, second[2], by_reverse),
            "sums": (gradients[:2], second[:2]),
            "statistics": tuple(statistics),
        }

    def on_one_device(self, groups):
        """The same of each group's joined batch, put back where it came from."""
        derivatives = jax.jit(self.derivatives)
        results = [None] * DEVICES
        sums = []
        for group in groups or [range(DEVICES)]:
            group = list(group)
            joined = [array[group].reshape(-1, *array.shape[2:]) for array in self.arrays]
            of_group = derivatives(self.scale, self.bias, *joined, devices=len(group))
            sums.append(of_group["sums"])
            parts = [each.reshape(len(group), 6, 3, 5) for each in of_group["like x"]]
            for place, device in enumerate(group):
                results[device] = [part[place] for part in parts], of_group["statistics"]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *results)
        total = jax.tree.map(lambda *arrays: sum(arrays), *sums)
        return {"like x": stacked[0], "sums": total, "statistics": stacked[1]}


def by_pmap(function, scale, bias, arrays):
    results = jax.pmap(partial(function, scale, bias), axis_name="i")(*arrays)
    return {**results, "sums": jax.tree.map(lambda each: each.sum(0), results["sums"])}


def by_vmap(function, scale, bias, arrays):
    results = jax.jit(jax.vmap(partial(function, scale, bias), axis_name="i"))(*arrays)
    return {**results, "sums": jax.tree.map(lambda each: each.sum(0), results["sums"])}


def by_shard_map(function, scale, bias, arrays, *, check_vma, groups):
    def on_a_device(scale, bias, *arrays):
        results = function(scale, bias, *(array[0] for array in arrays))
        results["like x"] = jax.tree.map(lambda each: each[None], results["like x"])
        if groups is not None:
            results["statistics"] = jax.tree.map(lambda each: each[None], results["statistics"])
        if not check_vma:  # with it, gradients of what all devices share are summed already
            results["sums"] = jax.lax.psum(results["sums"], "i")
        return results

    # Without groups the statistics are the same on all devices, and check_vma knows it.
    specs = {"like x": P("i"), "sums": P(), "statistics": P() if groups is None else P("i")}
    mapped = jax.shard_map(
        on_a_device,
        mesh=Mesh(np.array(jax.devices()), "i"),
        in_specs=(P(), P(), *[P("i")] * len(arrays)),
        out_specs=specs,
        check_vma=check_vma,
    )
    results = jax.jit(mapped)(scale, bias, *arrays)
    if groups is None:
        results["statistics"] = jax.tree.map(
            lambda each: jnp.broadcast_to(each, (DEVICES, *each.shape)), results["statistics"]
        )
    return results


def in_mapped_functions() -> None:
    for masked, activation, groups in ((True, "silu", None), (False, None, GROUPS)):
        problem = Problem(masked, activation)
        wanted = problem.on_one_device(groups)
        function = partial(problem.derivatives, axis_name="i", axis_index_groups=groups)
        ways = [
            by_pmap,
            partial(by_shard_map, check_vma=True, groups=groups),
            partial(by_shard_map, check_vma=False, groups=groups),
        ]
        for way in ways if groups else [*ways, by_vmap]:
            got = way(function, problem.scale, problem.bias, problem.arrays)
            near(got, wanted)


def test_mapped_functions():
    finish(start("in_mapped_functions", quickly_compiled=True))


def in_accuracy() -> None:
    """Devices with far apart and with large means, without x64."""
    random = np.random.default_rng(0)
    for hard in HARD:
        x = hard.x(DEVICES * 1000, 3)
        step = jax.pmap(partial(batch_norm, eps=hard.eps, axis_name="i"), axis_name="i")
        y, _ = step(x.reshape(DEVICES, 1000, 3))
        wanted = truth.batch_norm(x, eps=hard.eps).y
        close(y.reshape(-1, 3), wanted, rtol=0, atol=hard.tolerance)
    x = random.standard_normal((DEVICES, 1000, 3)).astype(np.float32)
    x += np.float32([0, 1e3, -1e5, 1])[:, None, None]
    weights = np.ones((DEVICES, 1000, 1), bool)
    weights[2, 1:] = False  # one element is far from all the others
    statistics = jax.pmap(lambda x, w: batch_statistics(x, mask=w, axis_name="i"), axis_name="i")(
        x, weights
    )
    counted = np.float64(x)[np.broadcast_to(weights, x.shape)].reshape(-1, 3)
    np.testing.assert_array_equal(statistics.count, np.full((DEVICES, 3), 3001))
    np.testing.assert_allclose(statistics.mean[0], counted.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.var[0], counted.var(0), rtol=1e-6)
    of_groups = partial(batch_norm, axis_name="i", axis_index_groups=np.array(GROUPS))
    y, _ = jax.pmap(of_groups, axis_name="i")(x[:, :1])  # one value on each device will do
    near(y, np.sign(x[:, :1] - x[[2, 3, 0, 1], :1]), 1e-2)


def test_accuracy():
    finish(start("in_accuracy"))


def floats_sent(text: str, collective: str) -> list[int]:
    """How many values each such collective of a compiled program has."""
    results = re.findall(rf" = (\(.*?\)|\S+) {collective}(?:-start)?\(", text)
    return [
        sum(
            int(np.prod([int(size) for size in shape.split(",") if size]))
            for shape in re.findall(r"\w+\[([\d,]*)\]", result)
        )
        for result in results
    ]


def in_communication() -> None:
    """The collectives of a step are those that the module's docstring tells."""
    x = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    for devices in (2, 4):
        mesh = Mesh(np.array(jax.devices()[:devices]), "i")
        for forward in (True, False):

            def step(x, forward=forward):
                def loss(x):
                    return (batch_norm(x, axis_name="i")[0] ** 3).sum()

                return loss(x)[None] if forward else jax.grad(loss)(x)

            mapped = jax.shard_map(step, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
            text = jax.jit(mapped).lower(x).compile().as_text()
            assert "batchnorm_normalize" in text, "native within shard_map"
            assert floats_sent(text, "all-reduce") == [3 * 6, 3 * 6] + ([] if forward else [2 * 6])
            for other in ("all-gather", "all-to-all", "collective-permute"):
                assert not floats_sent(text, other)


def test_communication():
    finish(start("in_communication"))


def in_sharded_jit() -> None:
    """Statistics of the whole batch, and no device is sent the part of another."""
    mesh = Mesh(np.array(jax.devices()), "i")
    random = np.random.default_rng(0)
    for shape, axis in (((8, 6, 6, 5), -1), ((8, 5, 6, 6), 1), ((20_000, 5), -1)):
        x = (random.normal(size=shape) + 3).astype(np.float32)
        dy = random.normal(size=shape).astype(np.float32)
        mask = random.uniform(size=(shape[0], *[1] * (len(shape) - 1))) < 0.7
        scale = random.uniform(0.5, 2, 5).astype(np.float32)
        for masked in (False, True):

            def step(x, dy, mask, scale, axis=axis, masked=masked):
                def loss(x, scale):
                    y, statistics = batch_norm(x, scale, axis=axis, mask=mask if masked else None)
                    return (y * dy).sum(), (y, statistics)

                return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, scale)

            wanted = jax.jit(step)(x, dy, mask, scale)
            sharded = [jax.device_put(each, NamedSharding(mesh, P("i"))) for each in (x, dy, mask)]
            compiled = jax.jit(step).lower(*sharded, scale).compile()
            text = compiled.as_text()
            sent = [
                each
                for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute")
                for each in floats_sent(text, collective)
            ]
            assert sent
            assert max(sent) <= x.size // 50, "sums are sent, and no part of x"
            got = compiled(*sharded, scale)
            assert got[0][0].sharding.is_equivalent_to(sharded[0].sharding, len(shape))
            near(got, wanted)

    # One axis of the mesh is mapped, the other left to XLA.
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("i", "j"))
    partly = jax.shard_map(
        lambda x: batch_norm(x, axis_name="i")[0],
        mesh=mesh,
        in_specs=P("i"),
        out_specs=P("i"),
        axis_names={"i"},
    )
    sharded = jax.device_put(x, NamedSharding(mesh, P(("i", "j"))))
    compiled = jax.jit(partly).lower(sharded).compile()
    if jax.config.jax_use_shardy_partitioner:  # The one before it gathers all of x.
        assert max(floats_sent(compiled.as_text(), "all-gather"), default=0) <= x.size // 50
    near(compiled(sharded), batch_norm(x)[0])


def test_sharded_jit():
    finish(start("in_sharded_jit"))


def in_golden() -> None:
    index = json.loads((GOLDEN / "index.json").read_text())
    for name in ("pmap_all", "pmap_groups"):
        wanted = dict(np.load(GOLDEN / f"{name}.npz"))
        layer = nn.BatchNorm.partial(
            axis_name="i",
            axis_index_groups=index[name]["axis_index_groups"],
            **index[name]["arguments"],
        )
        with nn.stateful() as state:
            _, params = layer.init(jax.random.PRNGKey(0), wanted["x"][0])

        def step(x, layer=layer, params=params, state=state):
            with nn.stateful(state) as new_state:
                y = layer.call(params, x)
            return y, new_state

        y, state = jax.pmap(step, axis_name="i")(wanted["x"])
        near(y, wanted["y"])
        near(state["/"]["mean"], wanted["mean"])
        near(state["/"]["var"], wanted["var"])


def test_golden():
    finish(start("in_golden", quickly_compiled=True))


def in_one_of_two_processes(rank: str, port: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(rank))
    problem = Problem(True, "silu")
    wanted = problem.on_one_device(None)
    mesh = Mesh(np.array(jax.devices()), "i")
    assert mesh.size == DEVICES
    assert len(jax.local_devices()) == 2

    def everywhere(array):
        sharding = NamedSharding(mesh, P("i"))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    got = by_shard_map(
        partial(problem.derivatives, axis_name="i"),
        problem.scale,
        problem.bias,
        [everywhere(array) for array in problem.arrays],
        check_vma=True,
        groups=None,
    )
    near(got["sums"], wanted["sums"])
    for one, other in zip(got["like x"], wanted["like x"], strict=True):
        for shard in one.addressable_shards:
            near(shard.data, np.asarray(other)[shard.index])
    jax.distributed.shutdown()


def test_devices_on_their_own():
    finish(start("in_devices_on_their_own"))


def in_devices_on_their_own() -> None:
    """Without axis_name; the statistics vary over the devices only if x does."""
    random = np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()), "i")
    x = random.normal(size=(8 * DEVICES, 6)).astype(np.float32)
    scales = random.uniform(0.5, 2, (DEVICES, 6)).astype(np.float32)

    def step(x, scale):
        def loss(x, scale):
            y, statistics = batch_norm(x, scale[0])
            return (y**3).sum(), (y[None], statistics.mean)

        return jax.grad(loss, argnums=1, has_aux=True)(x, scale)

    own, sliced = P("i"), x.reshape(DEVICES, -1, 6)
    for spec, batches in ((P(), [x] * DEVICES), (own, sliced)):
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(spec, own), out_specs=(own, (own, spec)), check_vma=True
        )
        gradient, (y, mean) = mapped(x, scales)
        for device, (batch, scale) in enumerate(zip(batches, scales, strict=True)):
            wanted = step(batch, scale[None])
            near((gradient[device], y[device]), (wanted[0][0], wanted[1][0][0]))
            near(mean.reshape(-1, 6)[0 if spec == P() else device], wanted[1][1])


def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start("in_one_of_two_processes", rank, port, devices=2, quickly_compiled=True)
        for rank in "01"
    ]
    finish(*ranks)


def in_parameters_of_their_own() -> None:
    """Each device has another scale and another eps: gradients are those of the joined batch."""
    mesh = Mesh(np.array(jax.devices()), "i")
    random = np.random.default_rng(0)
    x, dy = (random.normal(size=(8, 5, 4)).astype(np.float32) for _ in range(2))
    scales = random.normal(size=(4, 4)).astype(np.float32)
    many_eps = np.array([0.1, 0.2, 0.3, 0.4], np.float32)

    def wanted(x, scales, eps):
        deviation = jnp.sqrt(x.var((0, 1)) + jnp.repeat(eps, 2)[:, None, None])
        return (x - x.mean((0, 1))) / deviation * jnp.repeat(scales, 2, 0)[:, None]

    def of_device(x, scales, eps, with_eps):
        eps = eps[0] if with_eps else 0.3
        return batch_norm(x, scales[0], eps=eps, axis_name="i")[0]

    for with_eps in (False, True):
        for check_vma in (True, False):
            ours = jax.shard_map(
                partial(of_device, with_eps=with_eps),
                mesh=mesh,
                in_specs=(P("i"), P("i"), P("i")),
                out_specs=P("i"),
                check_vma=check_vma,
            )
            eps = many_eps if with_eps else np.full(4, 0.3, np.float32)
            near(ours(x, scales, eps), wanted(x, scales, eps))
            arguments = (0, 1, 2) if with_eps else (0, 1)
            got, exact = (
                jax.jit(jax.grad(lambda *each, f=f: (f(*each) ** 3 * dy).sum(), arguments))(
                    x, scales, eps
                )
                for f in (ours, wanted)
            )
            near(got, exact)
            tangents = x**2, scales + 1, eps * with_eps
            got, exact = (
                jax.jit(lambda *each, f=f: jax.jvp(f, each[:3], each[3:])[1])(
                    x, scales, eps, *map(np.float32, tangents)
                )
                for f in (ours, wanted)
            )
            near(got, exact)


def test_parameters_of_their_own():
    finish(start("in_parameters_of_their_own", quickly_compiled=True))


def in_explicit_meshes() -> None:
    """A batch whose type says how it is split: as a whole one, and no device is sent its part."""
    axis_type = jax.sharding.AxisType
    use_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
    if hasattr(jax, "reshard"):
        reshard = jax.reshard
    else:
        from jax.experimental.shard import reshard
    random = np.random.default_rng(0)
    x, dy = (random.normal(3, size=(8, 6, 4, 12)).astype(np.float32) for _ in range(2))
    mask = random.uniform(size=(8, 6, 4, 1)) < 0.7
    scale = random.uniform(0.5, 2, 12).astype(np.float32)
    long = (random.normal(size=(40_000, 12)) + 100).astype(np.float32)

    def step(x, dy, scale, mask=None):
        def loss(x, scale):
            y, statistics = batch_norm(x, scale, mask=mask, activation="silu")
            return (y * dy).sum(), (y, statistics)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, scale)

    meshes = [((4,), ("i",), specs) for specs in (P("i"), P(None, None, "i"))]
    meshes += [((2, 2), ("i", "j"), P("i", "j")), ((2, 2), ("i", "j"), P(("i", "j"), None))]
    for kind in (axis_type.Explicit, axis_type.Auto):
        for shape, names, spec in meshes:
            mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
            with use_mesh(mesh):
                if kind == axis_type.Explicit:
                    resplit = jax.jit(lambda x, to=spec: batch_norm(reshard(x, to))[0])(x)
                    near(resplit, batch_norm(x)[0])
                    assert resplit.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
                for masked in (False, True):
                    wanted = jax.jit(step)(x, dy, scale, mask if masked else None)
                    split = [jax.device_put(each, NamedSharding(mesh, spec)) for each in (x, dy)]
                    weights = jax.device_put(mask, NamedSharding(mesh, spec)) if masked else None
                    mapped = partial(step, mask=weights)
                    compiled = jax.jit(mapped).lower(*split, scale).compile()
                    text = compiled.as_text()
                    for collective in ("all-gather", "all-to-all", "collective-permute"):
                        assert not floats_sent(text, collective), (kind, spec, collective)
                    for got in (compiled(*split, scale), mapped(*split, scale)):
                        near(got, wanted)
                        gradient, y = got[0][0], got[1][0]
                        for each in (gradient, y):
                            assert each.sharding.is_equivalent_to(split[0].sharding, x.ndim)
        by_features = jax.make_mesh((4,), ("i",), axis_types=(kind,))
        split = jax.device_put(x, NamedSharding(by_features, P(None, None, None, "i")))
        near(jax.jit(step)(split, dy, scale), jax.jit(step)(x, dy, scale))
        with_rows = jax.make_mesh((4,), ("i",), axis_types=(kind,))
        split = jax.device_put(long, NamedSharding(with_rows, P("i")))
        near(batch_norm(split)[0], batch_norm(long)[0])
        params = nn.BatchNorm.init(jax.random.PRNGKey(0), x)[1]
        split = jax.device_put(x, NamedSharding(with_rows, P("i")))
        near(nn.BatchNorm.call(params, split), nn.BatchNorm.call(params, x))


def test_explicit_meshes():
    finish(start("in_explicit_meshes", quickly_compiled=True))
