#!/usr/bin/env python3
"""The same idea without FastCGI: a small HTTP server, to be put behind a web server that proxies HTTP.

    python examples/http_server.py
    curl http://127.0.0.1:8080/ -d 'Hello!'
"""
from fastcgi import HandlerException, MinimalHTTPHandler, ReuseThreadingServer


class Echo(MinimalHTTPHandler):
    max_body = 1 << 20  # bytes; more is answered with 413

    def handle(self):
        if self.command not in ("GET", "HEAD", "POST"): raise HandlerException(405)
        body = f"{self.command} {self.path}\n".encode() + self.rfile.read()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", len(body))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)


if __name__ == "__main__":
    with ReuseThreadingServer(("127.0.0.1", 8080), Echo) as srv:
        try: srv.serve_forever()
        except KeyboardInterrupt: pass
