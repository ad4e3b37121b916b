#!/bin/sh
echo "a line for the log" >&2
printf 'Content-Type: text/plain\r\n'
echo "another" >&2
printf 'X-Mixed: line ends\n\r\n'
echo "for the client"
echo "the last" >&2
