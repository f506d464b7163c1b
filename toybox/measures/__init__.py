"""Measures of the embedded base, and the model card that holds them."""
