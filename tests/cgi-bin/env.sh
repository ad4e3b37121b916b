#!/bin/sh
printf 'Content-Type: text/plain\n\n'
env | grep -E -v '^(REMOTE_PORT|SERVER_ADDR|CONTEXT_.*|proxy-.*)=' | sort
