"""Batch normalization of JAX arrays: pure functions, for every transformation of JAX.

On the CPU, float32, float64, float16 and bfloat16 arrays whose feature axes lie side by side are
normalized, and their gradients computed, by the native kernels; anything else by the same formulas
in `jax.numpy`. Which of the two is chosen when a computation is lowered for its platform. Programs
that are exported with `jax.export`, and those that XLA splits over devices by itself, are jnp.

With `axis_name`, the statistics are those of the batch over all devices along a mapped axis of
`jax.pmap`, `jax.shard_map` or `jax.vmap`, exactly, however many elements each of them has. A step
of training then has three collectives: two forward, of 3 floats of each feature, and one backward,
of 2; a forward derivative has one of 2 as well. They are sums, as large for any number of devices.
(Groups under `check_vma` are gathered instead: as many floats from each device of the group.)
Under `jax.jit`, the batch is the whole array, however it is sharded, also by explicit axes. A
`jax.vmap` over axis_name is no loop: the kernels go over the whole batch at once. Under
`jax.vmap(jax.grad(...))` each example has gradients, and for these statistics, of its own, which
are then added up.

jet, checkify and `jax_debug_nans` know the operations of this package (give jet no function over
devices, which JAX can't). Other tools that read programs are given `in_plain_jax(function)`.
"""

from ..installation import missing

try:
    import jax  # noqa: F401
except ModuleNotFoundError as error:
    raise missing("batchnorm.jax", "JAX", "jax") from error

from ..moments import Statistics
from .functions import batch_norm, batch_statistics, normalize, update_running
from .programs import in_plain_jax

__all__ = [
    "Statistics",
    "batch_norm",
    "batch_statistics",
    "in_plain_jax",
    "normalize",
    "update_running",
]

__dir__ = __all__.copy  # public names alone
