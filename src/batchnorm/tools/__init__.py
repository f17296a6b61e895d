"""What can be said of a model that is there already: `batchnorm --help` lists the commands.

A door's own `inspect` takes its models; this one takes what is by name.
"""

from .findings import Finding
from .inspection import inspect
from .report import Report
from .states import State

__all__ = ["Finding", "Report", "State", "inspect"]

__dir__ = __all__.copy  # public names alone
