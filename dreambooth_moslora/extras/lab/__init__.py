"""Studies: many runs whose differences are listed in a table, and mixers alone on a frozen basis."""
