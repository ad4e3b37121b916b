"""Fixtures for tests whose application runs in another process, see `sites.py`."""
import os

import pytest


@pytest.fixture
def fifo(short_dir):
    """A gate that a page waits at."""
    os.mkfifo(short_dir / "gate")
    return short_dir / "gate"


@pytest.fixture
def seen(short_dir):
    """Path of a file in which a page says what it saw of a client that left."""
    return short_dir / "seen"
