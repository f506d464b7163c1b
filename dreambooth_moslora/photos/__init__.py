"""A folder becomes photos: files, sidecars, checks, crops and data sets of the hub."""
