"""The namespace of an array: what `definition` and its rooms know of a framework."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from array_api_compat import array_namespace

Array = Any

_NAMESPACES: dict[type, Any] = {}


def namespace(x: Array) -> Any:
    """`array_namespace` of x, once for each type: a look-up takes longer than a small operation."""
    kind = type(x)
    if kind not in _NAMESPACES:
        _NAMESPACES[kind] = array_namespace(x)
    return _NAMESPACES[kind]


def quiet(xp: Any) -> AbstractContextManager[Any]:
    """Where what is not finite is meant, of which NumPy warns."""
    return xp.errstate(all="ignore") if hasattr(xp, "errstate") else nullcontext()
