#!/usr/bin/perl
die "before there is a header\n";
