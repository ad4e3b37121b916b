"""Fixtures for all tests: short directories, ports, web servers."""
from contextlib import ExitStack

import pytest
from frontends import servers


@pytest.fixture
def short_dir():
    """A directory for Unix sockets: `tmp_path` may be longer than the 107 bytes of a socket's path."""
    with servers.short_dir() as res: yield res


@pytest.fixture
def free_port():
    """A TCP port for 127.0.0.1 that no other test is given."""
    with servers.free_port() as res: yield res


@pytest.fixture
def frontend():
    """Starts web servers, `frontend(name, address)`, and stops them after the test; see `frontends/servers.py`."""
    with ExitStack() as stack: yield lambda *args, **kw: stack.enter_context(servers.frontend(*args, **kw))
