#!/usr/bin/env python3
import os
from http.cookies import SimpleCookie

cookies = SimpleCookie(os.environ.get("HTTP_COOKIE", ""))
visits = int(cookies["visits"].value) + 1 if "visits" in cookies else 1
new = SimpleCookie()
new["visits"], new["seen"] = visits, "yes"
new["visits"]["path"] = "/"
print(new)
print("Content-Type: text/plain")
print()
print("visit", visits)
