#!/usr/bin/perl
# As it was done before there were modules for it.
use strict;
use warnings;

my $buffer = $ENV{QUERY_STRING};
if ($ENV{REQUEST_METHOD} eq 'POST') { read(STDIN, $buffer, $ENV{CONTENT_LENGTH}); }
print "Content-type: text/html\n\n<dl>\n";
foreach my $pair (split(/&/, $buffer)) {
    my ($name, $value) = split(/=/, $pair);
    $value =~ tr/+/ /;
    $value =~ s/%([a-fA-F0-9][a-fA-F0-9])/pack("C", hex($1))/eg;
    print "<dt>$name<dd>$value\n";
}
print "</dl>\n";
