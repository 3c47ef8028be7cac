"""What users name in a config as `package.module:name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def function_named(path: str) -> Callable[..., Any]:
    """Import it. Raises ValueError saying what is wrong with `path`."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError("write it as package.module:function")
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{error}; install it, or name its folder in PYTHONPATH") from None
    except AttributeError:
        raise ValueError(f"module {module} has no {name}; correct the name") from None
    except Exception as error:  # a module raises what it likes
        raise ValueError(f"importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError("it is no function; name one")
    return function
