#!/usr/bin/env python3
import os

print("content-type: text/plain")
print("status: " + {"/404": "404 Nothing Here", "/304": "304", "/204": "204 No Content"}.get(
    os.environ.get("PATH_INFO"), "418 I'm a Teapot"))
print("X-Powered-By: tea\n")
if os.environ.get("PATH_INFO") not in ("/204", "/304"): print("short and stout")
