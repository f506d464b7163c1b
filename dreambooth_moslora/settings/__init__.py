"""The settings of a run: their table, their checks, and the files they are read from."""
