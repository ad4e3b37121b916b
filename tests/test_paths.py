"Where an application is mounted: what real web servers send as SCRIPT_NAME and PATH_INFO, and what that means."
import helpers as h
import pytest

from fastcgi.paths import script_and_path

SENT = [  # SCRIPT_NAME, PATH_INFO (None: not sent), what is asked
    ("/", "", ("", "/")),  # Caddy and nginx at the root
    ("/", None, ("", "/")),  # Apache
    ("", "/", ("", "/")),  # lighttpd, h2o
    ("", "", ("", "/")), (None, None, ("", "/")),
    ("/app.py", "/a b", ("/app.py", "/a b")),  # all that split
    ("/app.py", "/", ("/app.py", "/")),
    ("/app.py", "", ("/app.py", "")), ("/app.py", None, ("/app.py", "")),
    ("/app.py/a/b", None, ("/app.py", "/a/b")),  # ProxyPass
    ("/cgi-bin/deep/app.fcgi/x.py/y", None, ("/cgi-bin/deep/app.fcgi", "/x.py/y")),
    ("/users/5", None, ("", "/users/5")),  # nginx with its stock fastcgi_params
    ("/users/5", "", ("", "/users/5")),  # Caddy
    ("/a\nb", "", ("", "/a\nb")),
    ("/.py/x", "", ("", "/.py/x")), ("/x.python", "", ("", "/x.python")),
    ("", "/app.py/a", ("", "/app.py/a")),  # h2o, lighttpd with a prefix of /: as it was configured
    ("/shop", "/a", ("/shop", "/a")),
    ("/", "/a", ("", "/a")), ("/shop/", "/a", ("/shop", "/a")), ("/shop/", "a", ("/shop", "/a")),
    ("", "a", ("", "/a")),
    ("/ü", "/é", ("/ü", "/é"))]


def env(script, path):
    return {k: v for k, v in (("SCRIPT_NAME", script), ("PATH_INFO", path)) if v is not None}


@pytest.mark.parametrize(("script", "path", "expected"), SENT)
def test_as_the_web_server_says(script, path, expected): assert script_and_path(env(script, path)) == expected


@pytest.mark.parametrize(("root", "script", "expected"), [
    ("web", "/app.py/admin", ("/app.py", "/admin")),
    ("web", "/x.py/admin", ("", "/x.py/admin")),  # which a visitor has invented, as a way around /admin
    ("web", "/dir.py/admin", ("", "/dir.py/admin")),
    ("web", "/x.py\0/admin", ("", "/x.py\0/admin")),
    ("none", "/x.py/admin", ("/x.py", "/admin"))])  # on another machine: nobody can tell
def test_a_program_that_the_web_server_does_not_know(tmp_path, root, script, expected):
    (tmp_path / "web" / "dir.py").mkdir(parents=True)
    (tmp_path / "web" / "app.py").touch()
    root = str(tmp_path / root)
    sent = {"DOCUMENT_ROOT": root, "SCRIPT_NAME": script, "SCRIPT_FILENAME": root + script}
    assert script_and_path(sent) == expected
    alias = {"DOCUMENT_ROOT": str(tmp_path), "SCRIPT_NAME": "/app.py/a", "SCRIPT_FILENAME": f"{tmp_path}/web/app.py/a"}
    assert script_and_path(alias) == ("/app.py", "/a")


@pytest.mark.parametrize(("script", "path", "mount", "expected"), [
    ("/shop/a", "", "/shop", ("/shop", "/a")),
    ("/shop/a", None, "/shop/", ("/shop", "/a")),
    ("", "/shop/a", "shop", ("/shop", "/a")),
    ("/shop", "/a", "/shop", ("/shop", "/a")),
    ("/shop", "", "/shop", ("/shop", "")),
    ("/shop/", "", "/shop", ("/shop", "/")),
    ("/shopping", "", "/shop", ("/shop", "/shopping")),  # not a part of the path, so it was cut off
    ("/a", "", "/shop", ("/shop", "/a")),  # handle_path of Caddy
    ("/", "", "/shop", ("/shop", "/")),
    ("/app.py", "/a", "", ("", "/app.py/a")),
    ("/app.py/a", None, "/", ("", "/app.py/a")),
    ("/app.py", "/a", "/app.py", ("/app.py", "/a")),
    ("/app.py/a", None, "/app.py", ("/app.py", "/a")),
    ("", "", "", ("", "/")), ("/", "", "", ("", "/")), ("", "/", "", ("", "/")), ("/", "/a", "", ("", "/a")),
    ("a", "b", "", ("", "a/b")), ("a", "", "", ("", "/a"))])
def test_where_it_is_said_to_be(script, path, mount, expected):
    assert script_and_path(env(script, path), mount) == expected


@pytest.mark.parametrize("vector", [o for o in h.vectors() if o.role == h.RESPONDER], ids=str)
def test_front_ends_agree_on_what_is_asked(vector):
    "However they cut it, the whole is the path that was sent on, and a program is where it is, but for a prefix of /."
    wire = h.Wire()
    for event in wire.send(vector.data):
        if type(event).__name__ != "BeginRequest": continue
        environ = event.exchange.environ
        script, path = script_and_path(environ)
        assert script + path in (environ["SCRIPT_NAME"] + environ.get("PATH_INFO", ""), "/")
        shown = environ["REQUEST_URI"].startswith("/app.py") and environ["SCRIPT_NAME"]  # it may be the index of /
        assert script == ("/app.py" if shown else "")
        whole = script + path
        assert script_and_path(environ, "") == ("", whole)
        if script: assert script_and_path(environ, script) == (script, path)


@pytest.mark.parametrize(("uri", "script", "path", "expected"), [
    ("/a%20b?q", "/app.py", "/a b", ("", "/a b")),  # RewriteRule ^/(.*) /app.py/$1
    ("/%C3%BC/%FF", "/app.py", "/\xfc/\udcff", ("", "/\xfc/\udcff")),
    ("/sub/a", "/sub/app.fcgi", "/a", ("/sub", "/a")),  # the same in a .htaccess
    ("/sub/", "/sub/app.fcgi", "", ("/sub", "/")),  # DirectoryIndex
    ("/", "/app.py", None, ("", "/")),  # the index of HAProxy
    ("/users/5", "/app.py", "", ("", "/users/5")),  # FallbackResource, php_fastcgi of Caddy
    ("/app.py/a", "/app.py", "/a", ("/app.py", "/a")),
    ("/ap%70.py/a", "/app.py", "/a", ("/app.py", "/a")),
    ("/old/a", "/app.py", "/new/a", ("/app.py", "/new/a")),  # another rewrite: as the web server wants it
    ("/old/a", "/new", "/a", ("/new", "/a")), ("/old", "/new", "", ("", "/new")),
    ("", "/app.py", "/a", ("/app.py", "/a")), ("*", "/app.py", "/a", ("/app.py", "/a"))])
def test_program_whose_name_is_not_in_the_url(uri, script, path, expected):
    assert script_and_path(env(script, path) | {"REQUEST_URI": uri}) == expected
    whole = "".join(expected)
    assert script_and_path(env(script, path) | {"REQUEST_URI": uri}, "") == ("", whole)
