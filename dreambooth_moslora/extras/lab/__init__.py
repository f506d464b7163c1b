"""Studies: many runs whose differences are listed in a table; the self-test of a machine."""
