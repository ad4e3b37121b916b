#!/bin/sh
printf 'Content-Type: text/plain\n\n'
for o in "$0" "$@"; do printf '<%s>\n' "$o"; done
pwd
umask
