"""Batch normalization for Flax: `batchnorm.flax.nn` is the module API of Flax before Linen."""

__all__ = ["nn"]  # noqa: F822, which `import` finds

__dir__ = __all__.copy  # public names alone
