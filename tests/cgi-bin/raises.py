#!/usr/bin/env python3
print("Content-Type: text/plain\n")
print("so far so good")
print(1 / 0)
