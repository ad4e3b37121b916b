#!/usr/bin/env python3
# Text is UTF-8 both ways, and what is none passes through unharmed.
import os
import sys
from urllib.parse import unquote

name = unquote(os.environ["QUERY_STRING"].partition("=")[2], errors="surrogateescape")
sys.stdout.write("Content-Type: text/plain; charset=utf-8\r\nX-Name: grüße\r\n\r\n")
print("Grüße,", name, "🎉", os.environ.get("PATH_INFO", ""))
print(ascii(os.environ.get("PATH_INFO")), sys.stdin.read(), sys.stdout.encoding, sys.stdout.errors)
