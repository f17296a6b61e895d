"""Batch normalization for Flax: `batchnorm.flax.nn` is the module API of Flax before Linen."""
