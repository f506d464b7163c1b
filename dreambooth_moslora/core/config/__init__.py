"""The settings of a run: their descriptions, their checks, and the files they are read from."""
