"""What a run leaves on the disk: its folder, its events, its adapters, and the process that trains it."""
