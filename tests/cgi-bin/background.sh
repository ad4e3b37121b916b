#!/bin/sh
# The answer ends when nobody can write to it any more.
printf 'Content-Type: text/plain\n\nfirst\n'
{ read -r line; printf 'behind the back: %s\n' "$line"; } <"$0" &
exit 0
