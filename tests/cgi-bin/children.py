#!/usr/bin/env python3
# Who writes when: what is flushed comes before what a child writes, what is not comes after it.
import os
import subprocess
import sys

print("Content-Type: text/plain\n")
print("flushed", flush=True)
os.system("echo from the shell; echo not for the client >&2")
print("waits")
subprocess.run(["echo", "from a child"], check=True)
os.write(1, b"past the buffer\n")
sys.stdout.flush()
subprocess.run(["tr", "a-z", "A-Z"], stdin=sys.stdin, stdout=sys.stdout, check=True)
print(subprocess.run(["sh", "-c", "echo $SCRIPT_NAME, $REQUEST_METHOD"], capture_output=True, text=True).stdout)
with os.fdopen(os.dup(sys.stdout.fileno()), "w") as f: f.write("by its number\n")
