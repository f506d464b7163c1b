"""Which run may write in a run folder: the lock, the queue, and what earlier runs left there."""
