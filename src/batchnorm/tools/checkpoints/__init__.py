"""Files of weights as nested mappings of arrays, each of which is read when it is asked for.

What a file is, its content says, and not its name. Nothing that a file holds is ever executed.
"""

from .reading import read
from .stored import Checkpoint, CheckpointError, Stored

__all__ = ["Checkpoint", "CheckpointError", "Stored", "read"]

__dir__ = __all__.copy  # public names alone
