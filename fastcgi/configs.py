"""What `fastcgi config` prints: the configuration of a web server, or of systemd, that works as it is printed.

Each is whole: where it goes, how to load it, and the site itself, in which all of a request's path after the place
where the application lives arrives in PATH_INFO, as CGI has it. `render` gives the text. Nothing is read or written.
"""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from shlex import quote

from .addresses import Address, parse_address
from .errors import FcgiError

__all__ = ("SERVERS", "ConfigError", "Site", "render", "units")


USER = "www-data"  # whom web servers run as on Debian
USERS = {"caddy": "caddy", "haproxy": "haproxy"}  # but for these


class ConfigError(FcgiError, ValueError):
    "No configuration can say that. One line."


@dataclass
class Site:
    "What is to be served."
    target: str  # of `fastcgi serve`
    address: Address  # where that listens: a Unix socket or TCP
    domain: str = ""  # the name that the site answers to, perhaps with a port; none: all names, at port 80
    mount: str = ""  # where on the site the application lives: "" or a path such as /app
    program: str = "fastcgi"  # the command, as systemd is to start it
    user: str = ""  # whom the web server runs as, and under systemd the application too; none: as it usually is

    def __post_init__(self) -> None:
        if self.address.kind not in ("unix", "tcp"):
            raise ConfigError(f"--bind {self.address}: give a path or host:port")
        if not re.fullmatch(r"([A-Za-z0-9._-]+|\[[0-9a-fA-F:]+\])?(:[0-9]{1,5})?", self.domain):
            raise ConfigError(f"--domain {self.domain!r}: give a name such as example.org or localhost:8080")
        if self.mount and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.mount):
            raise ConfigError(f"--mount {self.mount!r}: give a path such as /app, without a slash at its end")
        for what, value in (("--bind", self.path), ("TARGET", self.target)):
            if re.search(r"""[\s"'{}$;#\\%|]""", value):
                raise ConfigError(f"{what} {value!r}: a configuration needs a name without spaces and quotes")

    @property
    def path(self) -> str:
        "Of the socket, absolute."
        return os.path.abspath(self.address.path) if self.address.kind == "unix" else ""

    @property
    def host(self) -> str: return re.sub(r":[0-9]+\Z", "", self.domain)

    @property
    def port(self) -> int:
        found = re.search(r":([0-9]+)\Z", self.domain)
        return int(found[1]) if found else 80

    @property
    def local(self) -> bool:
        "The site is for this machine alone."
        return self.host in ("localhost", "127.0.0.1", "[::1]")

    @property
    def interface(self) -> str: return "" if not self.local else "[::1]" if self.host == "[::1]" else "127.0.0.1"

    @property
    def listen(self) -> str:
        "Address and port for HTTP."
        return f"{self.interface}:{self.port}" if self.local else str(self.port)

    @property
    def tcp(self) -> str: return str(self.address)

    @property
    def name(self) -> str:
        "Of the site, for its files."
        stem = os.path.basename(os.path.abspath(self.target.partition(":")[0]))
        return re.sub(r"[^A-Za-z0-9_-]+", "-", stem.removesuffix(".py")).strip("-") or "app"

    @property
    def bind(self) -> str: return self.path or self.tcp

    @property
    def serve(self) -> str: return f"fastcgi serve {self.target} --bind {self.bind}"

    @property
    def command(self) -> str:
        "That starts the application so that the web server, which runs as another user, may connect."
        return self.serve + (f" --group {self.user}" if self.path else "")

    @property
    def directory(self) -> list[str]:
        "What makes the socket's directory, where no system has it."
        folder = os.path.dirname(self.path)
        if not folder.startswith(("/run/", "/var/run/")): return []
        return ["Before that, and anew after each boot, which empties /run: "
                f'sudo install -d -o "$USER" -g {self.user} -m 750 {folder}']


def render(
    server: str,  # one of `SERVERS`
    site: Site,
) -> str:
    "The configuration. Raises `ConfigError` where `server` is none that is known."
    if server not in SERVERS: raise ConfigError(f"no configuration for {server!r}: choose {', '.join(SERVERS)}")
    return SERVERS[server](replace(site, user=site.user or USERS.get(server, USER)))


def _head(site: Site, *lines: str, more: str = "") -> str:
    return "".join(f"# {o}\n" for o in (*lines, f"The application: {site.command}{more}", *site.directory))


def _caddy(site: Site) -> str:
    upstream = f"unix/{site.path}" if site.path else site.tcp
    at, path = f"http://:{site.port}", "{path}"
    if site.domain and (site.local or site.port != 80): at = f"http://{site.domain}"  # no certificate is to be had
    elif site.domain: at = site.domain  # Caddy gets itself a certificate
    begin, end, indent = "", "", "\t"
    if site.mount: begin, end, indent = f"\thandle_path {site.mount}/* {{\n", "\t}\n", "\t\t"
    body = f"""reverse_proxy {upstream} {{
	# pass on at once what the application flushes
	flush_interval -1
	transport fastcgi {{
		env SCRIPT_NAME "{site.mount}"
		env PATH_INFO {path}
		# needs Caddy 2.7; before that, let --stderr log follow the command above, or what is said there is lost
		capture_stderr
	}}
}}
"""
    bind = f"\tbind {site.interface}\n" if site.local else ""
    redirect = f"\tredir {site.mount} {site.mount}/\n" if site.mount else ""
    return _head(site, "/etc/caddy/Caddyfile, or a file that it imports; then: systemctl reload caddy") + \
        f"{at} {{\n{bind}{redirect}{begin}" + "".join(f"{indent}{o}\n" for o in body.splitlines()) + f"{end}}}\n"


def _nginx(site: Site) -> str:
    where = f"unix:{site.path}" if site.path else site.tcp
    location = f"location {site.mount}/ {{" if site.mount else "location / {"
    path = "$fastcgi_path_info" if site.mount else "$fastcgi_script_name"
    split = f"        fastcgi_split_path_info ^({re.escape(site.mount)})(/.*)$;\n" if site.mount else ""
    redirect = f"    location = {site.mount} {{ return 301 {site.mount}/; }}\n" if site.mount else ""
    # Debian's fastcgi_params has it without the port, and URLs that an application makes of it would lead elsewhere
    host = "" if site.port == 80 else "        fastcgi_param HTTP_HOST $host:$server_port;\n"
    return _head(site, f"/etc/nginx/conf.d/{site.name}.conf; then: nginx -t && systemctl reload nginx") + f"""\
upstream {site.name} {{
    server {where};
    keepalive 16;  # connections that a worker of nginx keeps
}}

server {{
    listen {site.listen};
    server_name {site.host or "_"};
    client_max_body_size 16m;

{redirect}    {location}
        include fastcgi_params;
{host}{split}        fastcgi_param SCRIPT_NAME "{site.mount}";
        fastcgi_param PATH_INFO {path};
        fastcgi_param HTTP_PROXY "";  # httpoxy
        fastcgi_pass {site.name};
        fastcgi_keep_conn on;
        # a page that streams says so itself, with the header X-Accel-Buffering: no
    }}
}}
"""


def _apache(site: Site) -> str:
    base = f"unix:{site.path}|fcgi://{site.name}" if site.path else f"fcgi://{site.tcp}"
    listen = f"Listen {site.listen}\n" if site.port != 80 else ""
    name = f"    ServerName {site.host}\n" if site.host else ""
    where = f"{site.mount}/" if site.mount else "/"
    redirect = f'    RedirectMatch permanent "^{re.escape(site.mount)}$" "{site.mount}/"\n' if site.mount else ""
    path = "%{reqenv:SCRIPT_NAME}"
    if site.mount:  # the path as it came to us, without where we live
        path = "$1"
        lines = (f"        ProxyFCGISetEnvIf \"reqenv('SCRIPT_NAME') =~ m#^{re.escape(site.mount)}(/.*)$#\" "
                 f"PATH_INFO \"{path}\"\n")
    else: lines = f'        ProxyFCGISetEnvIf "true" PATH_INFO "{path}"\n'
    return _head(site, f"/etc/apache2/sites-available/{site.name}.conf; then: a2enmod proxy_fcgi && "
                 f"a2ensite {site.name} && systemctl reload apache2") + f"""\
{listen}<VirtualHost {site.interface or '*'}:{site.port}>
{name}    AllowEncodedSlashes On
{redirect}    # pass on at once what the application flushes
    ProxyPass "{where}" "{base}{where}" flushpackets=on
    <Location "{where}">
        Require all granted
        CGIPassAuth On
{lines}        ProxyFCGISetEnvIf "true" SCRIPT_NAME "{site.mount}"
    </Location>
</VirtualHost>
"""


def _lighttpd(site: Site) -> str:
    where = f'"socket" => "{site.path}"' if site.path else \
        f'"host" => "{site.address.host}", "port" => {site.address.port}'
    rule = f'"{site.mount or "/"}" => (( {where}, "check-local" => "disable"' + \
        ("" if site.mount else ', "fix-root-scriptname" => "enable"') + " ))"
    text = f"fastcgi.server += ( {rule} )\n"
    if site.domain: text = f'$HTTP["host"] == "{site.domain if site.port != 80 else site.host}" {{\n    {text}}}\n'
    port = f"server.port = {site.port}\n" if site.port != 80 else ""
    if site.local: port += f'server.bind = "{site.interface.strip("[]")}"\n'
    return _head(site, f"/etc/lighttpd/conf-available/90-{site.name}.conf; then: lighty-enable-mod {site.name} && "
                 "systemctl reload lighttpd") + f'server.modules += ( "mod_fastcgi" )\n{port}{text}'


def _h2o(site: Site) -> str:
    where = f"{{port: {site.path}, type: unix}}" if site.path else \
        f"{{host: {site.address.host}, port: {site.address.port}, type: tcp}}"
    more = f" --script-name {site.mount}" if site.mount else ""  # h2o does not say where an application lives
    return _head(site, "/etc/h2o/h2o.conf; then: systemctl reload h2o", more=more) + f"""\
listen:
  host: {site.interface.strip("[]") or "0.0.0.0"}
  port: {site.port}
hosts:
  "{site.domain or "default"}":
    paths:
      "{site.mount or "/"}":
        fastcgi.connect: {where}
        fastcgi.timeout.keepalive: 5000
"""


def _haproxy(site: Site) -> str:
    where = f"unix@{site.path}" if site.path else site.tcp
    use, conditions = f"default_backend {site.name}", []
    if site.host: conditions.append(f"{{ hdr(host),field(1,:) -i {site.host} }}")
    if site.mount: conditions.append(f"{{ path_beg {site.mount}/ }}")
    if conditions: use = f"use_backend {site.name} if {' '.join(conditions)}"
    return _head(site, "/etc/haproxy/haproxy.cfg; then: haproxy -c -f /etc/haproxy/haproxy.cfg && "
                 "systemctl reload haproxy",
                 "HAProxy before 2.8 crashes where an application writes to STDERR, so here that goes to a log.",
                 more=" --stderr log") + f"""\
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s

frontend http
    bind {site.interface}:{site.port}
    {use}

backend {site.name}
    http-reuse always
    use-fcgi-app {site.name}
    server one {where} proto fcgi

fcgi-app {site.name}
    log-stderr global
    docroot /nonexistent
    path-info ^({re.escape(site.mount)})(/.*)$
    set-param HTTP_AUTHORIZATION %[req.hdr(authorization)]
"""


def units(site: Site) -> dict[str, str]:
    "systemd's two units by the names of their files: the socket stays while the service restarts, so nobody waits."
    site = replace(site, user=site.user or USER)
    listen = site.path or site.tcp
    access = f"SocketUser={site.user}\nSocketGroup={site.user}\nSocketMode=0660\n" if site.path else ""
    target = site.target if ":" in site.target else os.path.abspath(site.target)
    folder = os.getcwd() if ":" in site.target else os.path.dirname(target)
    return {f"{site.name}.socket": f"""\
[Unit]
Description=Socket of {site.name}

[Socket]
ListenStream={listen}
{access}
[Install]
WantedBy=sockets.target
""", f"{site.name}.service": f"""\
[Unit]
Description={site.name} over FastCGI
Requires={site.name}.socket
After=network.target

[Service]
Type=notify
NotifyAccess=main
WorkingDirectory={folder}
ExecStart={quote(site.program)} serve {quote(target)} --bind systemd
ExecReload=/bin/kill -HUP $MAINPID
KillMode=mixed
TimeoutStopSec=40
Restart=on-failure
User={site.user}
Group={site.user}
PrivateTmp=yes
ProtectSystem=full
NoNewPrivileges=yes

[Install]
WantedBy=multi-user.target
"""}


def _systemd(site: Site) -> str:
    files = units(site)
    parts = [f"# /etc/systemd/system/{name}\n{text}" for name, text in files.items()]
    return ("# Two files, which --output /etc/systemd/system writes; then:\n"
            f"# systemctl daemon-reload && systemctl enable --now {site.name}.socket\n\n" + "\n".join(parts))


SERVERS: Mapping[str, Callable[[Site], str]] = {
    "caddy": _caddy, "nginx": _nginx, "apache": _apache, "lighttpd": _lighttpd, "h2o": _h2o, "haproxy": _haproxy,
    "systemd": _systemd}


def config(
    server: str,  # caddy, nginx, apache, lighttpd, h2o, haproxy or systemd
    target: str,  # as for `fastcgi serve`
    bind: str = "/run/fastcgi/app.sock",  # where the application listens: a socket's path or host:port
    domain: str = "",  # name of the site, perhaps with a port: example.org, localhost:8080
    mount: str = "",  # where on the site the application lives, such as /app
    user: str = "",  # whom the web server runs as, and under systemd the application; as a rule www-data
    output: str = "",  # directory to write systemd's units to
) -> int:
    "Print a configuration for a web server that works as printed."
    site = Site(target, parse_address(bind), domain, mount, program=_program(), user=user)
    path = target if ":" not in target else target.partition(":")[0]
    if not os.path.exists(path) and (path == target or path.endswith(".py")):
        sys.stderr.write(f"fastcgi config: no such file: {path}; the configuration is printed all the same\n")
    if not output:
        sys.stdout.write(render(server, site))
        return 0
    if server != "systemd": raise ConfigError("--output is for systemd's units: send the others to a file with >")
    for name, text in units(site).items():
        path = os.path.join(output, name)
        try:
            with open(path, "x") as f: f.write(text)
        except FileExistsError: raise ConfigError(f"{path} exists: remove it first") from None
        except OSError as e: raise ConfigError(f"cannot write {path}: {e.strerror}") from e
        sys.stdout.write(f"{path}\n")
    return 0


def _program() -> str:
    "The command that runs now, for systemd, which wants an absolute path."
    here = os.path.join(os.path.dirname(sys.executable), "fastcgi")
    return here if os.access(here, os.X_OK) else "/usr/local/bin/fastcgi"
