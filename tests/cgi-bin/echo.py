#!/usr/bin/env python3
import os
import sys

body = sys.stdin.read()
print(f"Content-Type: {os.environ.get('CONTENT_TYPE') or 'text/plain'}")
print(f"X-Length: {len(body)}\n")
sys.stdout.write(body)
