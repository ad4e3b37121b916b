#!/usr/bin/perl
# Piece by piece.
$| = 1;
print "Content-type: text/plain\r\n\r\n";
print "$_ of 200\n" for 1 .. 200;
