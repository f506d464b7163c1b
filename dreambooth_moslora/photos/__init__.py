"""The photos of a folder: files, sidecars, checks, crops, and data sets of the hub."""
