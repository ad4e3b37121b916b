"""What a newcomer copies works as it is: examples, `Caddyfile.example`, each program and configuration of README.md.

Nothing in them is changed but what would be in the way here: ports, the directory /run/hello, and the group.
"""
import grp
import hashlib
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from frontends import servers
from frontends.servers import connects, wait_until
from helpers import Program

from fastcgi import FcgiClient
from fastcgi.configs import SERVERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)  # language and text
PROGRAMS = {re.match(r"# (\S+\.py)\n", o)[1]: o for lang, o in BLOCKS if lang == "python"}
EXAMPLES = {o.name: o.read_text(encoding="utf-8") for o in sorted(ROOT.glob("examples/*.py"))}
USER = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())  # of the web server's workers
GROUP = grp.getgrgid(USER.pw_gid).gr_name
PIXEL = bytes(range(256)) * 40 + b"\r\n--\r\r\n\n"

pytestmark = [pytest.mark.skipif(not README, reason="the sources are not here"), pytest.mark.slow]


def adapted(text: str, tmp: Path, http_port: int = 0, app_port: int = 0) -> str:
    """The same, for a place where others run too."""
    text = text.replace("/run/hello/", f"{tmp}/").replace("www-data", GROUP)
    return text.replace("8000", str(http_port)).replace("8080", str(app_port))


@contextmanager
def running(args, cwd, ready):
    """A process with all that it writes in `cwd`/log, from when it is ready to the end of the block."""
    env = {**os.environ, "HOME": str(cwd), "XDG_CONFIG_HOME": str(cwd), "XDG_DATA_HOME": str(cwd), "PATH": servers.PATH}
    path = cwd / "log"
    with open(path, "ab") as log:
        proc = subprocess.Popen([*map(str, args)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True)
    try:
        wait_until(lambda: proc.poll() is not None or ready(), f"{args} is ready")
        assert proc.poll() is None, path.read_text(errors="replace")
        yield proc
    finally: servers.stop(proc)


def program(code, tmp, address=None, name="program.py"):
    """A Python program that listens, by default at fcgi.sock or hello.sock in `tmp`."""
    (tmp / name).write_text(code, encoding="utf-8")
    paths = [str(tmp / o) for o in ("fcgi.sock", "hello.sock")]
    return running([sys.executable, "-W", "error", name], tmp,
                   lambda: connects(address) if address else any(map(connects, paths)))


def ask(path, body=b"", **params):
    """Status and text of an answer over FastCGI."""
    with FcgiClient(path, timeout=20) as client, client.request({"REQUEST_METHOD": "GET"} | params, body) as r:
        return r.status, r.read().decode()


def fetch(port, target="/", body=None, method="", headers=None):
    """Status and text of an answer over HTTP."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as conn:
        conn.request(method or ("GET" if body is None else "POST"), target, body, headers or {})
        with conn.getresponse() as r: return r.status, r.read().decode()


def form(**files):
    """A body as browsers send it for files, and its Content-Type."""
    parts = [b'--xYz\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\nContent-Type: image/png\r\n\r\n%b'
             b"\r\n" % (k.encode(), v) for k, v in files.items()]
    return b"".join(parts) + b"--xYz--\r\n", "multipart/form-data; boundary=xYz"


# The programs of README.md

CHECKS = {
    "hello.py": lambda tmp: ask(tmp / "fcgi.sock", QUERY_STRING="name=Zo%C3%AB") == (200, "Hello, Zoë!\n"),
    "digest.py": lambda tmp: ask(tmp / "fcgi.sock", PIXEL) == (200, hashlib.sha256(PIXEL).hexdigest() + "\r\n"),
    "countdown.py": lambda tmp: ask(tmp / "fcgi.sock") == (200, "3\n2\n1\nlift-off\n"),
    "service.py": lambda tmp: ask(tmp / "hello.sock", PATH_INFO="/x") == (200, "Hello from /x\n")}


def test_each_program_of_the_readme_is_checked():
    assert {*PROGRAMS} == {*CHECKS, "app.py", "ping.py"}
    for name, code in PROGRAMS.items(): compile(code, name, "exec", dont_inherit=True)


@pytest.mark.parametrize("name", CHECKS)
def test_program_serves_and_removes_its_socket(name, short_dir):
    with program(adapted(PROGRAMS[name], short_dir), short_dir, name=name) as proc: assert CHECKS[name](short_dir)
    assert proc.returncode == 0
    assert not [*short_dir.glob("*.sock")]


@pytest.mark.parametrize("name", (*CHECKS, "ping.py"))
def test_program_says_where_it_serves_and_ctrl_c_ends_it(name, short_dir, free_port):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: pytest.skip("SIGINT is ignored here, as under nohup")
    (short_dir / "program.py").write_text(adapted(PROGRAMS[name], short_dir, app_port=free_port), encoding="utf-8")
    with Program("-u", "program.py", cwd=short_dir) as proc:
        wait_until(lambda: "Ctrl-C ends it" in proc.said() or proc.poll() is not None, "it says that it serves")
        proc.send_signal(signal.SIGINT)
        assert proc.ended() == 0 and "Traceback" not in proc.said(), proc.said()


def test_service_lets_the_group_of_the_web_server_in(short_dir):
    with program(adapted(PROGRAMS["service.py"], short_dir), short_dir):
        def seen():
            st = (short_dir / "hello.sock").stat()
            return st.st_mode & 0o777, grp.getgrgid(st.st_gid).gr_name

        wait_until(lambda: seen() == (0o660, GROUP), "the group is let in")


@pytest.mark.parametrize("name", (*CHECKS, "examples/hello.py", "examples/handler.py"))
def test_program_runs_under_fastcgi_dev(name, short_dir, free_port):
    code = PROGRAMS[name] if name in PROGRAMS else EXAMPLES[Path(name).name]
    (short_dir / "program.py").write_text(adapted(code, short_dir), encoding="utf-8")
    args = [sys.executable, "-m", "fastcgi", "dev", "program.py", "--port", free_port]
    with running(args, short_dir, lambda: connects(("127.0.0.1", free_port))):
        status, text = fetch(free_port)
        assert status == 200, text


def test_application_of_the_readme_is_served_by_its_command(short_dir):
    pytest.importorskip("flask")
    (short_dir / "app.py").write_text(PROGRAMS["app.py"], encoding="utf-8")
    command, = (o.split() for k, o in BLOCKS if k == "sh" and o.startswith("fastcgi serve"))
    with running([sys.executable, "-m", *command], short_dir, lambda: connects(str(short_dir / "app.sock"))):
        assert ask(short_dir / "app.sock", PATH_INFO="/") == (200, "Hello!")


def test_http_program_of_the_readme(short_dir, free_port):
    code = adapted(PROGRAMS["ping.py"], short_dir, app_port=free_port)
    with program(code, short_dir, ("127.0.0.1", free_port)):
        assert fetch(free_port, "/?a=b") == (200, "GET /?a=b\n")
        assert fetch(free_port, method="HEAD") == (200, "")


def test_stderr_goes_to_the_log_as_the_readme_says(short_dir):
    said, = {*re.findall(r"`(@fastcgi\(stderr.*?\))`", README)}
    code = PROGRAMS["hello.py"].replace("@fastcgi()", said) + '    print("a remark", file=sys.stderr)\n'
    with program(code, short_dir):
        assert ask(short_dir / "fcgi.sock")[0] == 200
        wait_until(lambda: "a remark" in (short_dir / "log").read_text(), "it is in the log")


def test_logging_shows_what_the_readme_says(short_dir):
    said, = re.findall(r"`(logging.basicConfig\(.*?\))`", README)
    code = PROGRAMS["digest.py"].replace("import hashlib\n", f"import hashlib, logging; {said}\n")
    server = re.findall(r"`(with PreForkUnixServer.*?)`", README, re.DOTALL)[0].replace("\n", " ")
    code = code.replace('serve(Digest, "fcgi.sock")', f"\n    from fastcgi import PreForkUnixServer\n    {server}")
    assert "    with" in code
    with program(code.replace("self.print()", "1 / 0"), short_dir):
        assert ask(short_dir / "fcgi.sock")[0] == 500
        wait_until(lambda: "ZeroDivisionError" in (short_dir / "log").read_text(), "the traceback is in the log")


def test_the_first_program_runs_as_cgi(short_dir):
    (short_dir / "hello.py").write_text(PROGRAMS["hello.py"], encoding="utf-8")
    env = os.environ | {"GATEWAY_INTERFACE": "CGI/1.1", "REQUEST_METHOD": "GET", "QUERY_STRING": "name=Ada"}
    said = subprocess.check_output([sys.executable, "hello.py"], cwd=short_dir, stdin=subprocess.DEVNULL, env=env)
    assert said == b"Content-Type: text/plain; charset=utf-8\n\nHello, Ada!\n"


def test_the_readme_is_short(): assert len(README.splitlines()) < 350


def test_links_of_the_readme_lead_somewhere():
    anchors = {"#" + re.sub(r"[^\w -]", "", o).lower().replace(" ", "-") for o in re.findall("(?m)^##+ (.*)", README)}
    links = re.findall(r"\]\((?!\w+:)([^)]+)\)", README)
    assert len(links) > 5
    assert not [o for o in links if not (o in anchors if o[0] == "#" else (ROOT / o).exists())]


# Web servers

@contextmanager
def web_server(name, conf, tmp, port):
    """Caddy or nginx with the configuration `conf`."""
    command, *args = servers.COMMANDS[name].split()
    (tmp / "conf").write_text(conf)
    with running([servers.which(command), *(o.format(tmp / "conf") for o in args)], tmp,
                 lambda: connects(("127.0.0.1", port))): yield


def adapt(conf, tmp):
    """What Caddy makes of a Caddyfile."""
    (tmp / "conf").write_text(conf)
    args = [servers.which("caddy"), "adapt", "--adapter", "caddyfile", "--config", tmp / "conf"]
    return json.loads(subprocess.run(args, capture_output=True, check=True, timeout=20).stdout)


CADDYFILE = ROOT / "Caddyfile.example"


@pytest.mark.frontend
def test_caddyfile_opens_one_port_and_only_here(tmp_path):
    conf = adapt(CADDYFILE.read_text(), tmp_path)
    assert conf["admin"] == {"disabled": True}
    assert [o["listen"] for o in conf["apps"]["http"]["servers"].values()] == [["127.0.0.1:8000"]]
    assert {*conf["apps"]} == {"http"}


@pytest.mark.frontend
def test_caddyfile_becomes_that_of_a_site_as_the_readme_says(tmp_path):
    site = CADDYFILE.read_text().partition("\n}\n")[2].replace("http://:8000", "example.com")
    site = site.replace("bind 127.0.0.1", "").replace("unix/fcgi.sock", "unix//run/hello/hello.sock")
    server, = adapt(site, tmp_path)["apps"]["http"]["servers"].values()
    assert server["listen"] == [":443"]
    assert '"dial": "unix//run/hello/hello.sock"' in json.dumps(server)


@pytest.mark.frontend
def test_caddy_serves_the_example_with_the_caddyfile_as_it_is(short_dir, free_port):
    conf = CADDYFILE.read_text().replace("8000", str(free_port))
    code = EXAMPLES["hello.py"]
    with program(code, short_dir, name="hello.py"), web_server("caddy", conf, short_dir, free_port):
        status, text = fetch(free_port)
        assert status == 200 and "Hello, world!" in text and 'href="/upload"' in text
        assert "Hello, Zoë &lt;b&gt;!" in fetch(free_port, "/?x=y", b"name=Zo%C3%AB+%3Cb%3E")[1]
        assert "<td>PATH_INFO<td>/environ\n" in fetch(free_port, "/environ?a=b")[1]
        assert "<td>QUERY_STRING<td>a=b\n" in fetch(free_port, "/environ?a=b")[1]
        status, text = fetch(free_port, "/no%20such/%C3%A4")
        assert status == 404 and "/no such/ä" in text
        body, kind = form(pixel=PIXEL)
        assert hashlib.sha256(PIXEL).hexdigest() in fetch(free_port, "/upload", body, headers={"Content-Type": kind})[1]
        assert fetch(free_port, "/upload", bytes(17 << 20), headers={"Content-Type": kind})[0] == 413


@pytest.mark.frontend
def test_caddy_passes_on_what_is_flushed(short_dir, free_port):
    conf = CADDYFILE.read_text().replace("8000", str(free_port))
    with program(EXAMPLES["handler.py"], short_dir), web_server("caddy", conf, short_dir, free_port):
        with closing(http.client.HTTPConnection("127.0.0.1", free_port, timeout=20)) as conn:
            conn.request("GET", "/")
            with conn.getresponse() as r:
                first = r.read1()
                rest = r.read()
        assert first.startswith(b"line 1 of 3") and b"line 3" not in first
        assert b"line 3 of 3" in rest


@pytest.mark.frontend
def test_caddy_proxies_to_the_http_program(short_dir, free_port):
    with servers.free_port() as app_port:
        line, = re.findall(r"`(reverse_proxy [0-9.:]+)`", README)
        site = f"http://:{free_port} {{\nbind 127.0.0.1\n{line}\n}}\n".replace("8080", str(app_port))
        conf = "{\nadmin off\n}\n" + site
        code = adapted(PROGRAMS["ping.py"], short_dir, app_port=app_port)
        with program(code, short_dir, ("127.0.0.1", app_port)), web_server("caddy", conf, short_dir, free_port):
            assert fetch(free_port, "/a?b=c") == (200, "GET /a?b=c\n")
            assert fetch(free_port, "/", b"body") == (200, "POST /\n")
            assert fetch(free_port, method="HEAD") == (200, "")


def printed(command, cwd, *args):
    """What a command of README.md that begins like that prints."""
    said, = {*re.findall(rf"`fastcgi ({command}.*?)`", README)}
    return subprocess.check_output([sys.executable, "-m", "fastcgi", *adapted(said, cwd).split(), *args], cwd=cwd,
                                   text=True)


def nginx_of_the_readme(tmp, port):
    """For service.py."""
    (tmp / "service.py").touch()
    return printed("config nginx service.py", tmp, "--domain", f"127.0.0.1:{port}")


def test_each_web_server_of_the_readme_has_its_configuration(tmp_path):
    (tmp_path / "app.py").write_text(PROGRAMS["app.py"], encoding="utf-8")
    table = re.findall(r"`fastcgi config (\w+) app.py:app`", README)
    assert table == [*SERVERS] and all("app.py:app" in printed(f"config {o} app.py:app", tmp_path) for o in table)


NGINX = """daemon off;
pid {tmp}/pid;
error_log {tmp}/error.log info;
{user}
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {tmp}/t1; fastcgi_temp_path {tmp}/t2; proxy_temp_path {tmp}/t3;
    uwsgi_temp_path {tmp}/t4; scgi_temp_path {tmp}/t5;
    {server}
}}
"""


@pytest.mark.frontend
def test_nginx_serves_the_service_with_the_configuration_of_the_readme(short_dir, free_port):
    servers.which("nginx")
    shutil.copy("/etc/nginx/fastcgi_params", short_dir)  # nginx looks beside its configuration
    user = f"user {USER.pw_name} {GROUP};" if os.geteuid() == 0 else ""
    conf = NGINX.format(tmp=short_dir, user=user, server=nginx_of_the_readme(short_dir, free_port))
    code = adapted(PROGRAMS["service.py"], short_dir)
    with program(code, short_dir), web_server("nginx", conf, short_dir, free_port):
        assert fetch(free_port, "/some/where?a=b") == (200, "Hello from /some/where\n")
        assert fetch(free_port) == (200, "Hello from /\n")
        assert fetch(free_port, "/upload", bytes(5 << 20)) == (200, "Hello from /upload\n")


@pytest.mark.frontend
def test_nginx_passes_on_what_is_flushed_and_tells_where_the_program_lives(short_dir, free_port):
    servers.which("nginx")
    shutil.copy("/etc/nginx/fastcgi_params", short_dir)
    user = "user root;" if os.geteuid() == 0 else ""  # the examples' socket is for their own user
    server = nginx_of_the_readme(short_dir, free_port).replace("hello.sock", "fcgi.sock")
    with web_server("nginx", NGINX.format(tmp=short_dir, user=user, server=server), short_dir, free_port):
        with program(EXAMPLES["handler.py"], short_dir):
            with closing(http.client.HTTPConnection("127.0.0.1", free_port, timeout=20)) as conn:
                conn.request("GET", "/")
                with conn.getresponse() as r:
                    first = r.read1()
                    rest = r.read()
            assert b"line 3" not in first and b"line 3 of 3" in rest
        with program(EXAMPLES["hello.py"], short_dir):
            text = fetch(free_port, "/environ")[1]
            assert "<td>SCRIPT_NAME<td>\n" in text and "<td>PATH_INFO<td>/environ\n" in text
            assert 'href="/upload"' in text


# Started by others

@pytest.mark.frontend
def test_program_is_started_by_systemd(short_dir):
    activate = shutil.which("systemd-socket-activate")
    if not activate: pytest.skip("systemd-socket-activate is not installed")
    (short_dir / "hello.py").write_text(PROGRAMS["hello.py"], encoding="utf-8")
    path = str(short_dir / "hello.sock")
    env = [f"--setenv={o}" for o in ("HOME", "PYTHONPATH") if o in os.environ]
    with running([activate, "--listen", path, *env, sys.executable, short_dir / "hello.py"], short_dir,
                 lambda: connects(path)):
        assert ask(path, QUERY_STRING="name=Ada") == (200, "Hello, Ada!\n")


@pytest.mark.frontend
def test_program_is_started_by_spawn_fcgi(short_dir):
    (short_dir / "hello.py").write_text(PROGRAMS["hello.py"], encoding="utf-8")
    path = str(short_dir / "fcgi.sock")
    args = [servers.which("spawn-fcgi"), "-n", "-s", path, "--", sys.executable, short_dir / "hello.py"]
    with running(args, short_dir, lambda: connects(path)):
        assert ask(path, QUERY_STRING="name=Ada") == (200, "Hello, Ada!\n")


# The examples

def test_each_example_is_checked(): assert {*EXAMPLES} == {
    "hello.py", "handler.py", "http_server.py",
    "forms.py",  # in test_forms.py
    "bottle_app.py", "django_app.py", "fastapi_app.py", "flask_app.py", "starlette_app.py"}  # in test_frameworks.py


def test_hello_takes_what_browsers_send(short_dir):
    sock = short_dir / "fcgi.sock"
    with program(EXAMPLES["hello.py"], short_dir):
        def upload(body, kind): return ask(sock, body, PATH_INFO="/upload", REQUEST_METHOD="POST", CONTENT_TYPE=kind)

        status, text = ask(sock, PATH_INFO="/", SCRIPT_NAME="/app")
        assert status == 200 and "Hello, world!" in text and 'href="/app/upload"' in text
        assert "Hello, &lt;&#x27;&amp;!" in ask(sock, b"name=%3C'%26", PATH_INFO="/")[1]
        assert ask(sock, PATH_INFO="/upload")[0] == 200
        files = {"ä<.png": PIXEL, "empty": b"", "ends": b"\r\n", "lines": b"a\nb\rc\r\n" * 1000}
        status, text = upload(*form(**files))
        assert status == 200 and "<td>ä&lt;.png<td>" in text
        for data in files.values(): assert f"<td>{len(data)}<td>{hashlib.sha256(data).hexdigest()}\n" in text
        for kind in ("", "text/plain", "multipart/form-data", "multipart/form-data; boundary=other"):
            assert upload(b"name=value", kind)[0] == 200
        assert upload(bytes((16 << 20) + 1), "text/plain")[0] == 413
        assert ask(sock, PATH_INFO="/<no>")[0] == 404 and "&lt;no&gt;" in ask(sock, PATH_INFO="/<no>")[1]
        text = ask(sock, PATH_INFO="/environ", HTTP_COOKIE="<a>")[1]
        assert "<td>HTTP_COOKIE<td>&lt;a&gt;\n" in text and "<td>PATH<td>" not in text


def test_handler_streams(short_dir):
    sock = short_dir / "fcgi.sock"
    with program(EXAMPLES["handler.py"], short_dir):
        said = f"{len(PIXEL)} bytes, SHA-256 {hashlib.sha256(PIXEL).hexdigest()}\r\n"
        assert ask(sock, PIXEL, REQUEST_METHOD="POST") == (200, said)
        with FcgiClient(sock, timeout=20) as client, client.request({"REQUEST_METHOD": "GET"}) as r:
            first, rest = r.read1(), r.read()
        assert first.startswith(b"line 1 of 3") and b"line 3" not in first and b"line 3 of 3" in rest


def test_http_server_answers_and_refuses(short_dir, free_port):
    code = adapted(EXAMPLES["http_server.py"], short_dir, app_port=free_port)
    with program(code, short_dir, ("127.0.0.1", free_port)):
        assert fetch(free_port, "/a") == (200, "GET /a\n")
        assert fetch(free_port, "/a", b"Hello!") == (200, "POST /a\nHello!")
        assert fetch(free_port, method="HEAD") == (200, "")
        assert fetch(free_port, method="DELETE")[0] == 405
        assert fetch(free_port, "/a", bytes((1 << 20) + 1))[0] == 413
