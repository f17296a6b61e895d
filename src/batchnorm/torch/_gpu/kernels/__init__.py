"""The stages as Triton kernels: what is read and written, and what is computed on the way.

A tensor like x is [outer, channels, inner] in memory; a row is one `outer`, of `width` = channels ·
inner columns. F is the dtype of arithmetic: float64 for float64, else float32.

    moments_kernel         x ─► partial sums of each program
    merge_moments_kernel   partial sums ─► statistics, table; running statistics move
    normalize_kernel       x, table ─► y
    gradient_sums_kernel   x, dy, table ─► partial sums (and the residual's gradient)
    merge_sums_kernel      partial sums ─► dscale, dbias, shares; their sums, for other processes
    input_gradient_kernel  x, dy, table, shares ─► dx

Where all of a channel fits one program, `forward_kernel` and `backward_kernel` do three each.
Between these, `coefficients_kernel` makes a table of statistics that come from elsewhere,
`shares_kernel` shares of the sums of several processes, and `running_kernel` judges a batch as a
whole before running statistics move.

**Sums** are those of t = x − pivot; a program's pivot is the mean of its first tile (with weights,
of the first elements that count, of half of the tile's lanes at least). Rounding costs n elements
ε·n·(pivot − mean)², but the pivot being the mean of at least n / (2·MOST_TILES) of them (tiles.py),
their sum of squares is at least (pivot − mean)²·n / (2·MOST_TILES). Programs are merged in float64:
Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
(1979), for many sets at once. Where squares overflow in F, the columns concerned are summed once
more in a UNIT in which none does, and their sum of squares is handed on negative; where sums of
weights overflow, these are in that unit, too, and negative.

**The table** has what the other kernels need of a channel, so that they neither divide nor know
float64. They compute u = x/2 − center, which no finite x lets overflow and which is rounded once;
what the center lacks of the mean is in the shift.

No atomics: the same numbers for the same shape, dtype and alignment, in whatever order programs
run. Loads and stores are as wide as the compiler can prove them aligned: it is told so of the very
offsets, since of a value that was an argument it forgets.
"""

from .backward import gradient_sums_kernel, input_gradient_kernel, merge_sums_kernel, shares_kernel
from .channels import TABLE_ROWS
from .forward import (
    coefficients_kernel,
    merge_moments_kernel,
    moments_kernel,
    normalize_kernel,
    running_kernel,
)
from .whole import backward_kernel, forward_kernel

__all__ = [
    "TABLE_ROWS",
    "backward_kernel",
    "coefficients_kernel",
    "forward_kernel",
    "gradient_sums_kernel",
    "input_gradient_kernel",
    "merge_moments_kernel",
    "merge_sums_kernel",
    "moments_kernel",
    "normalize_kernel",
    "running_kernel",
    "shares_kernel",
]
