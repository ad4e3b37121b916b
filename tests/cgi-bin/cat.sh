#!/bin/sh
printf 'Content-Type: application/octet-stream\n\n'
cat
