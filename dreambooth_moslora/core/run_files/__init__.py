"""A run's files on the disk: its folder, events, adapters, and the process that trains it."""
