"""What MLX does not promise, and `batchnorm.mlx._compat` relies on: one test for each use there."""

import mlx.core as mx
import mlx.nn
import pytest
from compare import close

from batchnorm.mlx import BatchNorm
from batchnorm.mlx._compat import is_traced_for_any_size, random_state_kept


class Everything(set):
    def __contains__(self, key):
        return True


class WithFrozenKeys(mlx.nn.Module):
    def __init__(self, keys):
        super().__init__()
        self._no_grad = keys
        self.weight = mx.ones(2)


def test_frozen_keys_are_asked_by_in_and_kept_in_no_grad():
    assert WithFrozenKeys({"weight"}).trainable_parameters() == {}
    parent = mlx.nn.Sequential(WithFrozenKeys(Everything()))
    parent.unfreeze()
    assert parent.layers[0].trainable_parameters() == {}


def test_arrays_are_set_as_items():
    class Recording(mlx.nn.Module):
        def __setitem__(self, key, value):
            seen.append((key, value.dtype))
            super().__setitem__(key, value)

    seen = []
    module = Recording()
    module.weight = mx.ones(2)
    parent = mlx.nn.Sequential(module)
    parent.set_dtype(mx.bfloat16)
    parent.update({"layers": [{"weight": mx.zeros(2, mx.float16)}]})
    assert seen == [("weight", mx.float32), ("weight", mx.bfloat16), ("weight", mx.float16)]


def test_attributes_are_set_as_such():
    class Recording(mlx.nn.Module):
        def __setattr__(self, key, value):
            seen.append(key)
            super().__setattr__(key, value)

    seen = []
    module = Recording()
    module.eps = 0.5
    module.eps = mx.array(0.25)
    assert seen[-2:] == ["eps", "eps"]
    assert vars(module).get("eps") is None
    module.eps = 0.5
    assert (vars(module)["eps"], "eps" in module) == (0.5, False)


def test_statistics_are_taken_by_a_method():
    class Other(mlx.nn.BatchNorm):
        def _calc_stats(self, x, ddof=0):
            return mx.array([1.0]), mx.array([1.0])

    close(Other(1, eps=1e-6)(mx.array([[2.0], [7.0]])), [[1.0], [6.0]])


def test_without_that_method_layers_work(monkeypatch):
    monkeypatch.delattr(mlx.nn.BatchNorm, "_calc_stats")
    monkeypatch.setattr("batchnorm.mlx._compat._CALC_STATS", None)
    close(BatchNorm(1, eps=1e-6)(mx.array([[2.0], [4.0]])), [[-1.0], [1.0]], atol=1e-5)


def test_extra_repr_stands_in_repr():
    class Described(mlx.nn.Module):
        def _extra_repr(self):
            return "size=2"

    assert repr(Described()) == "Described(size=2)"


@pytest.mark.parametrize(
    "within",
    [
        lambda function: function,
        lambda function: mx.grad(lambda x: function(x).sum()),
        mx.vmap,
        mx.compile,
    ],
    ids=["alone", "grad", "vmap", "compile"],
)
def test_a_broadcast_of_equal_shapes_is_an_operation_in_a_shapeless_trace_alone(within, tmp_path):
    def function(x):
        seen.append(is_traced_for_any_size())
        return x * 2

    seen, x = [], mx.ones((4, 3))
    within(function)(x)
    mx.compile(within(function))(x)
    assert set(seen) == {False}
    seen.clear()
    mx.compile(within(function), shapeless=True)(x)
    mx.export_function(str(tmp_path / "f.mlxfn"), within(function), x, shapeless=True)
    assert set(seen) == {True}


@pytest.mark.parametrize("seed", [0, 2**63 + 2**31 + 5])
def test_the_random_state_is_the_two_halves_of_a_seed(seed):
    mx.random.seed(seed)
    mx.random.uniform()
    with random_state_kept():
        expected = mx.random.normal((3,))
    close(mx.random.normal((3,)), expected, rtol=0, atol=0)
