#!/usr/bin/perl
print "Content-type: text/plain\n\n";
print "$_=$ENV{$_}\n" for grep { !/^(REMOTE_PORT|SERVER_ADDR|CONTEXT_.*|proxy-.*)$/ } sort keys %ENV;
