"""Moving statistics that are exactly those of the data at hand."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from .. import checks
from ..conventions import CONVENTIONS
from ..documentation import documented
from ..tools import recalibration
from ..tools.observation import call_of
from ._observation import as_numpy, normalizations, observed
from .layers import tensor

_CONVENTION = CONVENTIONS["keras"]


@documented(
    model="keras.Model, or a layer that holds some, built",
    layers="keras.layers and batchnorm.keras",
    divisor="count",
    others="The model is called with training=False.\nWith renorm, the other averages follow.",
)
def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    normalize_by: Literal["batch", "running"] = "batch",
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = True,
) -> None:
    """...

    Parameters
    ----------
    forward
        ... It is to call the model itself, not predict(), which is compiled.

    Examples
    --------
    >>> import keras, numpy as np
    >>> from batchnorm.keras import recalibrate
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> recalibrate(model, np.split(np.array([[1.0], [2.0], [3.0], [4.0], [5.0]]), [3]))
    >>> print(model.layers[0].moving_mean.value, model.layers[0].moving_variance.value)
    [3.] [2.]
    """
    checks.instance("model", model, keras.Layer)
    known = recalibration.Model(
        found=normalizations(model),
        kinds="BatchNormalization of keras.layers and batchnorm.keras",
        forward=call_of(model, forward, training=False),
        observed=lambda see, by: observed(model, see, normalize_by=by),
        correction=_CONVENTION.correction,
        keep=_keep,
        running=_running,
        commit=_commit,
        is_frozen=lambda layer: not layer.trainable,
    )
    recalibration.recalibrate(known, batches, normalize_by=normalize_by, progress=progress)


def _keep(layer: Any) -> Callable[[], None]:
    kept = [(each, ops.copy(tensor(each))) for each in layer.non_trainable_variables]

    def restore() -> None:
        for variable, value in kept:
            variable.assign(value)

    return restore


def _running(layer: Any) -> tuple[np.ndarray, np.ndarray]:
    variables = (layer.moving_mean, layer.moving_variance)
    mean, var = (as_numpy(tensor(each)).astype(np.float64) for each in variables)
    return mean, var


def _commit(layer: Any, mean: np.ndarray, var: np.ndarray, _: int) -> None:
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(var)
    if layer.renorm:
        layer.renorm_mean.assign(mean)
        layer.renorm_stddev.assign((var + layer.epsilon) ** 0.5)
        layer.moving_stddev.assign((var + layer.epsilon) ** 0.5)
