"""A run on the disk: its folder, its events, the processes that train, and the queue of runs."""
