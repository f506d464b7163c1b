"""The method (a mixer between A and B) and its files: raw, published, kohya's, and their verification."""
