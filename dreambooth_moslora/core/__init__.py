"""Settings, names, seeds, files and pictures for all other packages; it imports no torch."""
