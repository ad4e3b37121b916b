#!/usr/bin/env python3
print("Status: 303 See Other")
print("Location: http://www.example.org/elsewhere?a=b")
print("Content-Type: text/plain\n")
print("over there")
