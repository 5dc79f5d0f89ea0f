"""Reaching `train` and `serve`, which are not installed: commands that need them run from a checkout."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).resolve().parents[2]


def import_from_checkout(name: str) -> ModuleType:
    """Imports a module of the checkout this package lies in.

    Raises:
        FileNotFoundError: the package was installed from a wheel, which holds neither.
    """
    if not (CHECKOUT / "train" / "__init__.py").is_file():
        raise FileNotFoundError(f"{name} is not in the wheel: run this command from a checkout (pip install -e .)")
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(name)
