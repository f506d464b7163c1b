"""Draws pictures from parameters: the pipeline, its progress, and grids."""
