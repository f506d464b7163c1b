"""Files of a run: its folder, its events, the processes that train, and the queue of runs."""
