"""Studies: many runs whose differences are listed in a table, and a basis learnt over many subjects."""
