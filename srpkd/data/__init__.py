"""Data: folders of images, the doctor that looks at them first, and the generated worlds.

Names are loaded when they are first used: a world needs neither torchvision nor pillow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srpkd.data.doctor import Report, examine
    from srpkd.data.folders import DataError, open_dataset
    from srpkd.data.world import PALETTE, World, classes_of, generate_world, open_world, paint, write_world

__all__ = [
    "PALETTE",
    "DataError",
    "Report",
    "World",
    "classes_of",
    "examine",
    "generate_world",
    "open_dataset",
    "open_world",
    "paint",
    "write_world",
]

_HOME = {"DataError": "folders", "Report": "doctor", "examine": "doctor", "open_dataset": "folders"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'world')}"), name)
