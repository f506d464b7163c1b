"""Measures of the embedded base, and its model card."""
