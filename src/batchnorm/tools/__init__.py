"""Tools around batch normalization, for the command line: `batchnorm --help` lists them."""

__all__: list[str] = []

__dir__ = __all__.copy  # public names alone
