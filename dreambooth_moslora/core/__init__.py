"""Settings, names, seeds, files and pictures that every other package uses; imports no torch."""
