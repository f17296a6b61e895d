"""What the functions of every door have in common, said once.

A door decorates them with `documented`, and says in their docstrings only what is its own. `help`
and doctest see the whole.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .activations import CHOICES

Function = TypeVar("Function", bound=Callable[..., Any])

COMMON = {
    "batch_norm": """
Normalize x by its own statistics, as in training.

``y = activation((x - mean) / sqrt(var + eps) * scale + bias + residual)``, with the mean and
the population variance of each feature [1]_.

Parameters
----------
x : {array} of real floating-point numbers
scale, bias : {array} of the feature shape, optional
    1 and 0 where there is none.
axis : int or tuple of ints
    The feature axis or axes, which are not reduced.
eps : float
    Added to the variance, inside the root; within [1e-37, 1e30].
mask : {array} that broadcasts to x, optional
    Which elements count in the statistics: bools, or weights >= 0. All elements are normalized.
    NumPy refuses a negative weight or a NaN; elsewhere it makes its feature NaN.
residual : {array} that broadcasts to x, optional
activation : {activations}
allow_one_value : bool
    Whether x may have one element of each feature, of which only bias and residual are left: for
    layers that are initialized with one example.

Returns
-------
y : {array}, of the {like} of x
statistics : Statistics
    In {wide}, of the feature shape. Of an empty x: zeros.

Raises
------
TypeError
    If an argument is of the wrong type, or x not of a real floating-point dtype.
ValueError
    If an argument is out of range, has the wrong shape, or if x has one element a feature,
    unless allow_one_value.

References
----------
.. [1] Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
   Internal Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.
""",
    "normalize": """
Normalize x by a given mean and variance, as in evaluation.

Parameters
----------
x : {array} of real floating-point numbers
mean, var : {array} of the feature shape
    Running statistics, or those of `batch_statistics`.
...
    As in `batch_norm`.

Returns
-------
y : {array}, of the {like} of x

Raises
------
TypeError, ValueError
    As `batch_norm`.
""",
    "batch_statistics": """
Count, mean and population variance of each feature.

Parameters
----------
...
    As in `batch_norm`.

Returns
-------
Statistics
    In {wide}, of the feature shape. Of an empty x: zeros.

Raises
------
TypeError, ValueError
    As `batch_norm`; but one element a feature will do.
""",
    "update_running": """
Move running statistics towards those of a batch.

``new = (1 - rate) * old + rate * batch``; the variance of the batch is first multiplied by
``count / (count - correction)``. A feature of which the batch has no more than `correction`
elements stays as it was.

Parameters
----------
mean, var : {array} of the feature shape
statistics : Statistics
rate : float within [0, 1]
    The weight of the new value. PyTorch and MLX call it momentum; Flax and Keras call ``1 - rate``
    momentum.
correction : 0 or 1
    1 for the unbiased variance, as PyTorch and MLX keep it; 0 as Flax and Keras do.

Returns
-------
mean, var : {array}, of the dtypes that came, or float32 where those are narrower
    In which a small step would be rounded away.

Raises
------
TypeError, ValueError
    If an argument is of the wrong type, rate or correction is out of range, or a shape differs
    from the statistics'.
""",
    "batch_norm_gradients": """
Gradients of a loss through `batch_norm`, from its gradient with respect to y.

``dx = scale / sqrt(var + eps) * (g - w / m * (sum(g) + x_hat * sum(g * x_hat)))`` with
``g = dy * activation'``, w the mask (1 without one) and m its sum; the gradients of bias and
scale are the two sums.

Parameters
----------
dy : {array} of the shape of x
statistics : Statistics
    As `batch_norm` returned them.
...
    As they were given to `batch_norm`.

Returns
-------
Gradients
    x and residual in their dtypes, scale and bias in {wide}; None for what was not given.

Raises
------
TypeError, ValueError
    As `batch_norm`; and if dy or the statistics do not have the shapes that go with x.
""",
    "inspect": """
Say which batch normalizations of a model are sick, and in which channels.

Without batches, by what the layers keep; with batches, also by what comes to them in evaluation.
Nothing in the model changes.

Parameters
----------
model : {model}
    With layers of the framework, or ours.
batches : iterable of inputs, optional
    What the model is called with, once each; of a tuple or list, its first element.
forward : callable, optional
    What is called in the place of that, as ``forward(model, batch)``.

Returns
-------
batchnorm.tools.Report
    With `layers` and `findings`; print it. docs/tools.md says what each finding means.

Raises
------
TypeError
    If an argument is of the wrong type.
ValueError
    If the model has no batch normalization that keeps running statistics, or batches are given,
    but there is none.
""",
    "recalibrate": """
Make the running statistics of a model exactly those of some batches.

Those of training are an average in which the last batches weigh most, of a model that was another
one then [1]_. These are of the model as it is, and each element weighs the same, however large its
batch; with a mask, as much as it counts. The variance is divided by the {divisor}.
It is for use before an evaluation, after averaging weights, or for data of another kind.

Parameters
----------
model : {model}
    Changed in place, after the last batch; after an error or an interrupt, all is as it was.
batches : iterable
    Of the inputs of the model, or of tuples or lists whose first element is the input.
normalize_by : "batch" or "running"
    What layers normalize by meanwhile. By "batch", as in training, one pass over the batches serves
    all. By "running", one layer after the other, in the order of their calls, has a pass of its
    own, in which those before it are done: in evaluation, what comes to each then has exactly its
    statistics.
forward : function of the model and a batch, optional
    What to do with a batch, instead of calling the model with its input.
progress : bool
    Whether to show a bar, on a terminal and where `rich` is installed.

Raises
------
TypeError
    If an argument is of a wrong type, or a layer is called where what comes to it can't be seen.
ValueError
    If the model holds no batch normalization, or none that is called; if there are no batches, or
    none in a later pass; if what comes to a layer is not finite; or if an argument is out of range.

Notes
-----
The layers are those of {layers}, and of subclasses. {others}
Parameters, modes and random state are as before. What comes to a layer in several calls is pooled;
where one call is on what came of another, what comes to it then is of the statistics before, and
"running" is not exact. A layer that is left as it is, because it is frozen or too few elements come
to it, is named in a warning.

References
----------
.. [1] Wu & Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576.
""",
}


def documented(
    array: str = "array",
    wide: str = "float32, for float64 in float64",
    like: str = "shape and dtype",
    **words: str,
) -> Callable[[Function], Function]:
    """Complete the docstring of a function from what the doors have in common.

    The docstring goes on from the common text, and may begin with "..." to say so. Its entry for a
    name, in a section, stands in the place of the common one, or goes on from that if its text
    begins with "...". The common entry "..." is for all parameters of which nothing else is said.

    Parameters
    ----------
    array
        What the door calls an array.
    wide
        The dtype of its statistics.
    like
        What y has in common with x.
    **words
        What else a common text has in braces.
    """
    words |= {"array": array, "wide": wide, "like": like, "activations": CHOICES}

    def with_docstring(function: Function) -> Function:
        function.__doc__ = completed(function, COMMON[function.__name__].format(**words))
        return function

    return with_docstring


def completed(documented: Callable[..., Any], common: str) -> str:
    """The docstring of a function or class, completed from a common text as `documented` says."""
    sections = _sections(common), _sections(documented.__doc__ or "")
    parts = []
    for title in ("", "Parameters", "Returns", "Raises", "Notes", "References", "Examples"):
        texts = [each[title] for each in sections if each.get(title)]
        if not title:
            texts = [text.removeprefix("...").strip() for text in texts if text != "..."]
        elif title == "Parameters":
            texts = [_merged(texts, inspect.signature(documented).parameters)]
        elif title in ("Returns", "Raises"):
            texts = [_merged(texts)]
        if any(texts):
            heading = f"{title}\n{'-' * len(title)}\n" if title else ""
            parts.append(heading + "\n\n".join(texts))
    return "\n\n".join(parts)


def _sections(docstring: str) -> dict[str, str]:
    """The text under each title; that before the first has the title ""."""
    lead, *rest = re.split(r"^(\w+)\n-+$", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": lead.strip()} | {
        title: text.strip() for title, text in zip(rest[::2], rest[1::2], strict=True)
    }


def _merged(sections: list[str], parameters: Iterable[str] | None = None) -> str:
    """One section of all entries, in the order of `parameters`, if those are its names."""
    entries: dict[str, str] = {}
    for entry in (each for section in sections for each in re.split(r"\n(?=\S)", section)):
        head, _, text = entry.partition("\n")
        for name in head.split(" : ")[0].split(", "):
            goes_on = text.lstrip().startswith("... ")
            entries[name] = entries[name] + "\n" + text.replace("... ", "", 1) if goes_on else entry
    if parameters is not None:
        unsaid = ", ".join(name for name in parameters if name not in entries)
        rest = entries.get("...", "").replace("...", unsaid, 1)
        entries = {name: entries.get(name, rest) for name in parameters}
    return "\n".join(dict.fromkeys(entries.values()))


def with_parameters_of(parent: Callable[..., Any]) -> Callable[[Function], Function]:
    """Let `inspect.signature` show the parameters that a function hands on to its parent's."""

    def with_signature(function: Function) -> Function:
        theirs, own = (inspect.signature(each).parameters for each in (parent, function))
        new = [name for name in own if own[name].kind is inspect.Parameter.KEYWORD_ONLY]
        shown = [theirs[name] for name in theirs if name not in new] + [own[name] for name in new]
        shown.sort(key=lambda each: each.kind)  # **keywords last
        function.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return function

    return with_signature
