"""The same decorated script, started by the web server itself: its listening socket is descriptor 0."""
import http.client
import json
import os
import stat
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest
from frontends import servers
from frontends.servers import wait_until

pytestmark = pytest.mark.frontend

SCRIPT = """#!{python}
import sys
sys.path[:0] = {path}
import json, os
from fastcgi import fastcgi

@fastcgi
def page():
    body = sys.stdin.read()
    print("a line on STDERR", file=sys.stderr)
    print("Content-Type: application/json\\n")
    print(json.dumps([os.getpid(), os.environ["QUERY_STRING"], body]))
"""


def runs(*args, user):
    try: return subprocess.run(args, user=user, cwd="/", capture_output=True, timeout=30).returncode == 0
    except PermissionError: return False


@pytest.fixture
def script(short_dir):
    """A script that runs under any account, with the packages it needs where that account can read them."""
    user = "nobody" if os.geteuid() == 0 else None
    code = "import sys; assert sys.version_info >= (3, 10)"
    for python in (sys.executable, "/usr/bin/python3"):
        if runs(python, "-c", code, user=user): break
    else: pytest.skip("no Python that user `nobody` may run")
    for o in ("fastcgi", "fastcore"): copytree(Path(find_spec(o).origin).parent, short_dir / "lib" / o)
    path = short_dir / "app.py"
    path.write_text(SCRIPT.format(python=python, path=[str(short_dir / "lib")]))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", ("lighttpd-spawn", "h2o-spawn", "apache-fcgid"))
def test_script_is_started_served_and_stopped_by_the_web_server(name, script, frontend):
    web = frontend(name, app=script)

    def ask(method="GET", body=None):
        with closing(http.client.HTTPConnection("127.0.0.1", web.port, timeout=20)) as conn:
            conn.request(method, "/app.py?a=b", body)
            res = conn.getresponse()
            text = res.read()
        assert res.status == 200, (text, web.log())
        return json.loads(text)

    pid, query, body = ask()
    assert (query, body) == ("a=b", "")
    assert ask("POST", "Grüße".encode())[2] == "Grüße"
    wait_until(lambda: "a line on STDERR" in web.log(), "STDERR in the web server's log")
    assert stat.S_ISSOCK(os.stat(f"/proc/{pid}/fd/0").st_mode)
    servers.stop(web.proc)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the script has ended")
