#!/usr/bin/env python3
# Leaves its process in a mess. It finds it clean, however often it runs.
import locale
import os
import signal
import sys
import threading

before = os.umask(0o77), os.getcwd(), sorted(k for k in globals() if k[:1] != "_"), len(sys.argv), "X" in os.environ
before += signal.getsignal(signal.SIGALRM) is signal.SIG_DFL, sys.path[0], sys.excepthook is sys.__excepthook__
print("Content-Type: text/plain\n")
print(before)
os.chdir("/")
os.environ.clear()
os.environ["X"] = "left over"
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.alarm(1000)
sys.path[:] = []
sys.argv.append("more")
sys.excepthook = None
locale.setlocale(locale.LC_ALL, "C")
X = threading.local()
sys.stderr = None
del before, __name__, __file__
