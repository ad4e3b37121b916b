#!/usr/bin/env python3
import os
import sys

print("Content-Type: text/plain\n")
print(ascii(sys.argv), __name__, __file__, os.getcwd() == os.path.dirname(__file__) == sys.path[0])
