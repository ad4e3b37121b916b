#!/bin/sh
printf 'Status: 503 Too Busy\nRetry-After: 10\nContent-Type: text/plain\nX-Empty:\nX-Twice: a\nX-Twice: b\n\nlater\n'
exit 3
