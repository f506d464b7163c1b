"""Which run may write to a run folder: the lock, the queue, and the files of earlier runs."""
