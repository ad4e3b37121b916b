"""What the modules that mypyc can compile tell it (see `setup.py`); for Python it means nothing.

Neither mypyc nor mypy_extensions is needed to run the library, compiled or not.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ("mypyc_attr",)

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:
    def mypyc_attr(**_): return lambda cls: cls
