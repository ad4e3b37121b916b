#!/usr/bin/env python3
# The classic: a form, and a file with it.
import cgi
import html

form = cgi.FieldStorage()
print("Content-Type: text/html; charset=utf-8\n")
print("<h1>Guest book</h1>")
for key in sorted(form):
    for item in form[key] if isinstance(form[key], list) else [form[key]]:
        if item.filename: print(f"<p>{html.escape(key)}: {item.filename}, {item.type}, {len(item.file.read())} bytes")
        else: print(f"<p>{html.escape(key)}={html.escape(item.value)}")
print("<p>first:", form.getfirst("name", "nobody"), form.getlist("name"))
