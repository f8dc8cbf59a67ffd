"""Import of optional packages, with an error that says what to install."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType


@contextmanager
def imports_of(command: str) -> Iterator[None]:
    """Context for the imports of a command: a missing package ends the process with what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f'error: srpkd {command} needs {error.name}: pip install "srpkd[train]"')


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
