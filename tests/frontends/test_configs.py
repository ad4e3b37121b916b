"""What `fastcgi config` prints, loaded into the real web servers as it is printed, and asked through them."""
import http.client  # noqa: I001 - in rows
import json
import subprocess
from base64 import b64encode
from contextlib import contextmanager

import pytest
from frontends.servers import (CADDY, COMMANDS, MODULES, NGINX, PATH, Frontend, application, free_port, short_dir,
                               stop, which)

from fastcgi.addresses import parse_address
from fastcgi.configs import SERVERS, ConfigError, Site, render, units
from fastcgi.handler import FcgiHandler

# what a distribution's main file has, from which the printed one is read
AROUND = {
    "caddy": CADDY, "nginx": NGINX,
    "apache": """ServerRoot {tmp}
ServerName localhost
DefaultRuntimeDir {tmp}
PidFile {tmp}/httpd.pid
Mutex file:{tmp} default
ErrorLog {tmp}/error.log
User nobody
Group nogroup
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule alias_module {modules}/mod_alias.so
LoadModule proxy_module {modules}/mod_proxy.so
LoadModule proxy_fcgi_module {modules}/mod_proxy_fcgi.so
Include {file}
""",
    "lighttpd": 'server.document-root = "{tmp}"\nserver.errorlog = "{tmp}/error.log"\ninclude "{file}"\n',
    "h2o": None, "haproxy": None,  # what is printed is all of it
}
PARAMS = "/etc/nginx/fastcgi_params"


class Echo(FcgiHandler):
    def handle(self):
        names = "SCRIPT_NAME", "PATH_INFO", "QUERY_STRING", "REQUEST_URI", "HTTP_AUTHORIZATION", "HTTP_PROXY"
        seen = {o: self.environ.get(o, "") for o in names} | {"body": self.content()}
        self.print("Content-Type: application/json\n\n" + json.dumps(seen))


@contextmanager
def web_server(name, site, tmp):
    file = tmp / "printed.conf"
    file.write_text(render(name, site))
    main = file
    if AROUND[name]:
        main = tmp / "main.conf"
        main.write_text(AROUND[name].format(tmp=tmp, file=file, modules=MODULES))
    if name == "nginx":
        with open(PARAMS) as f: (tmp / "fastcgi_params").write_text(f.read())
    program, *args = COMMANDS[name].split()
    env = dict(PATH=PATH, LC_ALL="C.UTF-8", HOME=str(tmp), XDG_DATA_HOME=str(tmp), XDG_CONFIG_HOME=str(tmp))
    with open(tmp / "output", "ab") as out:
        proc = subprocess.Popen([which(program), *(o.format(main) for o in args)], cwd=tmp, env=env,
                                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    web = Frontend(name, site.port, tmp, proc)
    try:
        assert web.ready(), web.log()
        yield web
    finally: stop(proc)


def ask(web, path, method="GET", body=None, **headers):
    conn = http.client.HTTPConnection("127.0.0.1", web.port, timeout=10)
    try:
        conn.request(method, path, body, {"Host": f"localhost:{web.port}", **headers})
        res = conn.getresponse()
        return res.status, res.read()
    finally: conn.close()


@pytest.mark.frontend
@pytest.mark.parametrize("mount", ["", "/app"], ids=["at the root", "below a path"])
@pytest.mark.parametrize("net", ["unix", "tcp"])
@pytest.mark.parametrize("name", sorted(AROUND))
def test_it_works_as_printed(name, net, mount):
    which(COMMANDS[name].split()[0])
    with short_dir() as tmp, free_port() as port, free_port() as app_port:
        tmp.chmod(0o1777)
        address = str(tmp / "app.sock") if net == "unix" else ("127.0.0.1", app_port)
        site = Site("shop.py", parse_address(address), f"localhost:{port}", mount)
        with application(Echo, address), web_server(name, site, tmp) as web:
            secret = "Basic " + b64encode(b"me:x").decode()
            status, body = ask(web, f"{mount}/a%20b/?q=1", "POST", "hello", Authorization=secret, Proxy="evil")
            assert status == 200, (status, body, web.log())
            seen = json.loads(body)
            told = "" if name == "h2o" else mount  # the command that it prints has --script-name
            assert (seen["SCRIPT_NAME"], seen["PATH_INFO"]) == (told, mount[len(told):] + "/a b/"), seen
            assert seen["HTTP_AUTHORIZATION"] == secret
            assert (seen["REQUEST_URI"], seen["QUERY_STRING"], seen["body"]) == (f"{mount}/a%20b/?q=1", "q=1", "hello")
            status, body = ask(web, f"{mount}/")
            seen = json.loads(body)
            assert (seen["SCRIPT_NAME"], seen["PATH_INFO"]) == (told, mount[len(told):] + "/"), seen
            assert seen["HTTP_AUTHORIZATION"] == seen["HTTP_PROXY"] == "" or name != "nginx"
            if mount: assert ask(web, "/other")[0] == 404 or name in ("caddy", "haproxy")


def test_systemd_takes_the_units(tmp_path):
    analyze = which("systemd-analyze")
    for bind in ("/run/shop/app.sock", "127.0.0.1:9000"):
        site = Site("shop:app", parse_address(bind), program="/bin/true", user="root")
        for name, text in units(site).items(): (tmp_path / name).write_text(text)
        files = sorted(map(str, tmp_path.iterdir()))
        done = subprocess.run([analyze, "verify", *files], capture_output=True, text=True, timeout=60)
        assert not [o for o in done.stderr.splitlines() if "shop" in o], done.stderr


@pytest.mark.parametrize("bad", [{"domain": "a b"}, {"domain": "x; root /"}, {"mount": "app"}, {"mount": "/a/"},
                                 {"target": "x;y"}, {"address": parse_address("/tmp/a b.sock")},
                                 {"address": parse_address("fd:0")}], ids=repr)
def test_what_no_configuration_can_say_is_refused(bad):
    with pytest.raises(ConfigError) as e: Site(**{"target": "a.py", "address": parse_address(":9000"), **bad})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", SERVERS)
def test_a_public_site_has_its_name_and_says_how_the_application_starts(name):
    text = render(name, Site("shop.py", parse_address("/run/shop.sock"), "shop.example.org"))
    assert "/run/shop.sock" in text and (name == "systemd" or "shop.example.org" in text)
    assert "127.0.0.1" not in text
    group = {"caddy": "caddy", "haproxy": "haproxy --stderr log"}.get(name, "www-data")
    assert name == "systemd" or f"fastcgi serve shop.py --bind /run/shop.sock --group {group}\n" in text


@pytest.mark.parametrize("name", [o for o in SERVERS if o != "systemd"])
def test_a_directory_that_a_boot_empties_is_told_of(name):
    head = render(name, Site("shop.py", parse_address("/run/shop/shop.sock"), "shop.example.org")).splitlines()[:4]
    user = {"caddy": "caddy", "haproxy": "haproxy"}.get(name, "www-data")
    assert ("# Before that, and anew after each boot, which empties /run: "
            f'sudo install -d -o "$USER" -g {user} -m 750 /run/shop') in head
    for other in "/srv/shop.sock", "/run/shop.sock", ":9000":
        assert "install" not in render(name, Site("shop.py", parse_address(other), "shop.example.org"))


def test_h2o_does_not_say_where_an_application_lives_so_its_command_does():
    text = render("h2o", Site("shop.py", parse_address("/run/shop.sock"), "shop.example.org", "/shop"))
    assert "--group www-data --script-name /shop\n" in text


def test_an_unknown_server_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="no configuration for 'iis': choose caddy, nginx"):
        render("iis", Site("a.py", parse_address(":9000")))


def test_the_command_prints_it_and_writes_the_units(tmp_path, capsys):
    from fastcgi.cli import main
    assert main(["config", "nginx", "shop.py", "--bind", ":9000", "--domain", "shop.example.org"]) == 0
    assert capsys.readouterr().out == render("nginx", Site("shop.py", parse_address(":9000"), "shop.example.org"))
    command = ["config", "systemd", "shop.py", "--bind", "/run/shop.sock", "--output", str(tmp_path)]
    assert main(command) == 0
    assert {o.name for o in tmp_path.iterdir()} == {"shop.socket", "shop.service"}
    assert main(command) == 1 and "shop.socket exists: remove it first" in capsys.readouterr().err
    assert main(["config", "nginx", "shop.py", "--output", "."]) == 1
    assert "--output is for systemd's units" in capsys.readouterr().err
    for target in "none.py", "none.py:app":
        assert main(["config", "nginx", target]) == 0
        said = capsys.readouterr()
        assert said.out == render("nginx", Site(target, parse_address("/run/fastcgi/app.sock")))
        assert said.err == "fastcgi config: no such file: none.py; the configuration is printed all the same\n"
    assert main(["config", "nginx", "none:app"]) == 0 and not capsys.readouterr().err
