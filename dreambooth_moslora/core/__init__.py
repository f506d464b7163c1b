"""Names, seeds, errors and whole files for all other packages; it imports no torch."""
