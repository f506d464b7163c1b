"""What is known before a run: its steps, memory, precision, checks and the lines of `--dry_run`."""
