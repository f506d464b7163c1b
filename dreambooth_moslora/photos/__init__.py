"""The photos of a folder: files, sidecars, checks and crops."""
