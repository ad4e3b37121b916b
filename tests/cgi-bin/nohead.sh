#!/bin/sh
printf '\nnothing but a body\n'
