"""The page's training runs as processes: their start, their end, their cost, and turns on the GPU."""
