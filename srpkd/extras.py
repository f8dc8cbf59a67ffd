"""Import of optional packages, with an error that says what to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its name, as in an import statement.
        extra: the extra of srpkd that installs it.
        purpose: what needs it, for the error.

    Raises:
        ImportError: the module cannot be imported; the message says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        # in double quotes, which cmd.exe knows too
        raise ImportError(f'{purpose} needs {module} ({error}): pip install "srpkd[{extra}]"') from error
