#!/bin/sh
echo "Hello, world!"
echo "Content-Type: text/plain"
echo
echo "too late"
