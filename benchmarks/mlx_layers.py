"""Time batchnorm.mlx.BatchNorm beside mlx.nn.BatchNorm, as they are and compiled."""

from collections.abc import Callable

import measure
import mlx.core as mx
import mlx.nn
import numpy as np
from measure import LAST, Work

import batchnorm.mlx

Call = Callable[[mx.array], object]


def forward(layer: mlx.nn.Module) -> Call:
    return lambda x: layer(x)


def with_gradients(layer: mlx.nn.Module, dy: mx.array) -> Call:
    def call(x: mx.array) -> object:
        weight, bias = layer.weight, layer.bias

        def function(x: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
            layer.weight, layer.bias = weight, bias
            return [layer(x)]

        results = mx.vjp(function, [x, weight, bias], [dy])
        layer.weight, layer.bias = weight, bias
        return results

    return call


def calls(each: Work, call: str) -> measure.Calls:
    """Each call computes everything that a training step would evaluate."""
    shape = each.shape_in(LAST)
    random = np.random.default_rng(0)
    x, dy = (mx.array(random.standard_normal(shape, np.float32)) for _ in range(2))
    mx.eval(x, dy)

    def timed(cls: type[mlx.nn.Module], compiled: bool) -> Callable[[], object]:
        layer = cls(shape[-1]).train(call != "evaluation")
        mx.eval(layer.parameters())
        function = with_gradients(layer, dy) if call == "forward + backward" else forward(layer)
        if compiled:
            function = mx.compile(function, inputs=layer.state, outputs=layer.state)
        return lambda: mx.eval(function(x), layer.running_mean, layer.running_var)

    return {
        "batchnorm.mlx": timed(batchnorm.mlx.BatchNorm, False),
        "batchnorm.mlx, compiled": timed(batchnorm.mlx.BatchNorm, True),
        "mlx.nn": timed(mlx.nn.BatchNorm, False),
        "mlx.nn, compiled": timed(mlx.nn.BatchNorm, True),
        **measure.copies_of(np.array(x)),
    }


def main() -> None:
    arguments = measure.options(__doc__)
    found = []
    for each, layout in measure.work(arguments.quick):
        if layout != LAST:
            continue  # mlx.nn has no other
        for call in ("forward", "forward + backward", "evaluation"):
            found += measure.results(
                "MLX", each, layout, call, calls(each, call), quick=arguments.quick
            )
    title = f"MLX {mx.__version__} on {mx.default_device()}, float32."
    measure.show(found, title, arguments.json)


if __name__ == "__main__":
    main()
