"""Draws pictures from parameters: the pipeline and its progress."""
