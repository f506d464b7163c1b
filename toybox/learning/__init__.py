"""Training of the embedded base's parts, and the code that its scripts share."""
