"""Studies: many runs whose differences are listed in a table, compared by statistics and plots."""
