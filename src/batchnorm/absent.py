"""What a module says of a name that it does not have."""

import inspect


def no_attribute(module: str, name: str, advice: str | None = None) -> AttributeError | ImportError:
    """The error that the `__getattr__` of a module raises; it calls this itself.

    `advice` says what to use, and is the message. Where `from module import name` asks, it comes as
    an ImportError, since Python hides the text of an AttributeError there, which `hasattr` needs.
    """
    if advice is None:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    frame = inspect.currentframe()
    for _ in range(2):  # past this function and `__getattr__`
        frame = frame and frame.f_back
    if frame is not None and frame.f_code.co_name == "_handle_fromlist":  # importlib's
        return ImportError(advice, name=module)
    return AttributeError(advice)
