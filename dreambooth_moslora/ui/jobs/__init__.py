"""The page's training runs as processes: their start, their end, and their turns on the GPU."""
