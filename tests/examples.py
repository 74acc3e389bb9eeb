"""The scripts in examples/ as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import epmoe

FOLDER = Path(epmoe.__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    """The module of one example, which may import its neighbours as scripts do."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)
