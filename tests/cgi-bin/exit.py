#!/usr/bin/env python3
# What is written at the very end, and on standard error.
import atexit
import sys


class Last:
    def __del__(self): sys.stdout.write("and of objects\n")

atexit.register(print, "after the end")
last = open(1, "w", closefd=False)
last.write("a file that nobody closes\n")
print("Content-Type: text/plain\n")
print("before the end")
sys.exit("no more")
