my $s = 0; $s += $_ while <STDIN>; print "$s\n"; print STDERR "x";
