#!/usr/bin/env python3
# What the web server says, and nothing of anybody's own.
import os

NAMES = """AUTH_TYPE CONTENT_LENGTH CONTENT_TYPE DOCUMENT_ROOT GATEWAY_INTERFACE LC_CTYPE PATH PATH_INFO PATH_TRANSLATED
QUERY_STRING REDIRECT_STATUS REMOTE_ADDR REMOTE_USER REQUEST_METHOD REQUEST_SCHEME REQUEST_URI SCRIPT_FILENAME
SCRIPT_NAME SERVER_ADMIN SERVER_NAME SERVER_PORT SERVER_PROTOCOL SERVER_SIGNATURE SERVER_SOFTWARE""".split()
OTHERS = "CONTEXT_", "REMOTE_PORT", "SERVER_ADDR"  # of this connection, and of this part of the configuration

print("Content-Type: text/plain; charset=utf-8\n")
for name, value in sorted(os.environ.items()):
    if name in NAMES or name.startswith("HTTP_"): print(f"{name}={value}")
    elif not name.startswith((*OTHERS, "proxy-")): print("one of the server's own:", name)
