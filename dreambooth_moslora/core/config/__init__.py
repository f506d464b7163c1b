"""The settings of a run: what each is, how it is checked, and the files they are read from."""
