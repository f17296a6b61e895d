"""The comparisons of all tests: of arrays of any framework, alone or in tuples, lists and dicts.

|         | values                              | shapes | dtypes, devices | NaN equals NaN |
|---------|-------------------------------------|--------|-----------------|----------------|
| `close` | within rtol of each, plus atol      | equal  | any             | yes            |
| `near`  | within tolerance of the largest     | equal  | any             | yes            |
| `alike` | as `close`, with one tolerance      | equal  | equal           | no             |
| `same`  | equal                               | equal  | equal           | no             |

The first two compare with a truth, which is in float64; the others with what a peer, or another
way, computes. Tuples, lists and dicts have the same keys and as many elements, and None is None.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

# What rounding the result to the dtype alone costs, and a little arithmetic, for `near`.
ROUNDING = {
    np.dtype("float64"): 1e-12,
    np.dtype("float32"): 5e-6,
    np.dtype("float16"): 2e-3,
    np.dtype(ml_dtypes.bfloat16): 1.6e-2,
}


def as_numpy(array) -> np.ndarray:
    """The array of any framework, or a number, with its dtype: bfloat16 as ml_dtypes has it."""
    framework = type(array).__module__.partition(".")[0]
    narrow = str(getattr(array, "dtype", "")).endswith(".bfloat16")
    if framework == "mlx" and narrow:
        import mlx.core as mx

        return np.array(array.astype(mx.float32)).astype(ml_dtypes.bfloat16)
    if hasattr(array, "detach"):
        array = array.float() if narrow else array
        array = array.detach().numpy(force=True)
        return array.astype(ml_dtypes.bfloat16) if narrow else array
    return np.asarray(array)


def close(got, wanted, rtol=1e-5, atol=1e-5, what=""):
    """|got − wanted| <= rtol·|wanted| + atol, element by element."""
    for name, one, other in _pairs(got, wanted, what):
        _within(name, one, other, rtol, atol)


def near(got, wanted, tolerance=1e-5, what=""):
    """|got − wanted| <= tolerance·max(1, the largest finite |wanted|)."""
    for name, one, other in _pairs(got, wanted, what):
        size = np.abs(as_numpy(other).astype(np.float64))
        _within(name, one, other, 0, tolerance * np.max(size, initial=1, where=np.isfinite(size)))


def alike(got, wanted, tolerance, what=""):
    """What `close` says, of arrays that can stand for each other."""
    for name, one, other in _pairs(got, wanted, what):
        _of_one_kind(name, one, other)
        _within(name, one, other, tolerance, tolerance, equal_nan=False)


def same(got, wanted, what=""):
    """Arrays of one kind with the same values."""
    for name, one, other in _pairs(got, wanted, what):
        _of_one_kind(name, one, other)
        one, other = as_numpy(one), as_numpy(other)
        assert np.array_equal(one, other), f"{name}: {one}, not {other}"


def _pairs(got, wanted, name):
    """(name, got, wanted) of each array."""
    if isinstance(got, Mapping):
        assert isinstance(wanted, Mapping), f"{name}: {type(wanted)}"
        assert got.keys() == wanted.keys(), f"{name}: {set(got) ^ set(wanted)}"
        for key in got:
            yield from _pairs(got[key], wanted[key], f"{name}[{key!r}]")
    elif isinstance(got, (list, tuple)):
        assert isinstance(wanted, (list, tuple)), f"{name}: {type(wanted)}"
        assert len(got) == len(wanted), f"{name}: {len(got)} elements, not {len(wanted)}"
        for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
            yield from _pairs(one, other, f"{name}[{place}]")
    elif got is None or wanted is None:
        assert got is wanted, f"{name}: {got}, not {wanted}"
    else:
        yield name, got, wanted


def _of_one_kind(name, got, wanted):
    for attribute in ("dtype", "device"):
        one, other = (getattr(each, attribute, None) for each in (got, wanted))
        assert one == other, f"{name}: {attribute} {one}, not {other}"


def _within(name, got, wanted, rtol, atol, equal_nan=True):
    got, wanted = as_numpy(got), as_numpy(wanted)
    assert got.shape == wanted.shape, f"{name}: shape {got.shape}, not {wanted.shape}"
    got, wanted = (each.astype(np.float64) for each in (got, wanted))
    np.testing.assert_allclose(got, wanted, rtol, atol, equal_nan, err_msg=name)
