#!/bin/sh
# Looks at no body, whatever its size.
exec <&-
printf 'Status: 413 Content Too Large\nContent-Type: text/plain\n\nno, thank you\n'
