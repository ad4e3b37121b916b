#!/usr/bin/env python3
# A megabyte of all bytes, and what was sent, by the buffers.
import sys

body = sys.stdin.buffer.read()  # at first: mod_cgi reads no answer before it has written the body
out = sys.stdout.buffer
out.write(b"Content-Type: application/octet-stream\nCache-Control: no-store\n\n")
for _ in range(16): out.write(bytes(range(256)) * 256)
out.write(body)
