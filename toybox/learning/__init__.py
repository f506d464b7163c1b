"""Training of the embedded base's parts, and what the scripts for it share."""
