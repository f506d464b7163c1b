"""Studies: many runs that differ by what a table says, compared by statistics and plots."""
