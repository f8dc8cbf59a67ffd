"""Packages that only some of srpkd needs, and what to install where one is missing."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: its name, as ``import`` takes it.
        extra: the extra of srpkd that installs it.
        purpose: what needs it, for the error.

    Raises:
        ImportError: it is not installed, or cannot be imported; says what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module} ({error}): pip install 'srpkd[{extra}]'") from error
