#!/usr/bin/env python3
# With a module beside it, and its output under another encoding.
import io
import sys

from lib import layout

sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding="latin-1", newline="\r\n")
print("Content-Type: text/html; charset=iso-8859-1\n")
layout.page("Größe")
