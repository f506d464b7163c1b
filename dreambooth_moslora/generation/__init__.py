"""Parameters become pictures: the pipeline, its progress, and grids."""
