"""What commands tell the user beside their output: `say`."""
from __future__ import annotations

import sys

__all__ = ("say",)


def say(text: bytes | str) -> None:
    "To standard error, as it is and at once."
    sys.stdout.flush()
    sys.stderr.buffer.write(text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text)
    sys.stderr.buffer.flush()
