#!/usr/bin/env python3
# The child has the same standard output, and its own end.
import os
import sys

print("Content-Type: text/plain\n", flush=True)
if not (pid := os.fork()):
    print("the child:", sys.stdin.read(3))
    sys.exit(5)
print("its status:", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
