"""What HTTP calls a field and where a CGI header block ends: patterns that several modules need alike."""
from __future__ import annotations

import re

__all__ = ("TOKEN", "RAW_TOKEN", "HEAD_END")

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 5.6.2
RAW_TOKEN = TOKEN.encode()
HEAD_END = re.compile(rb"\A\r?\n|\n\r?\n")  # a blank line (RFC 3875 6.2)
