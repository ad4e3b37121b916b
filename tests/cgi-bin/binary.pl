#!/usr/bin/perl
binmode(STDOUT);
binmode(STDIN);
my @body = ();
while (read(STDIN, my $data, 8192)) { push @body, $data; }
print "Content-type: application/octet-stream\nContent-Disposition: attachment; filename=\"all\"\n\n";
print join('', map { chr } 0 .. 255) x 2048;
print @body;
