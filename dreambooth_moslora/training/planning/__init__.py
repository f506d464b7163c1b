"""What is known before a run: its steps, memory, precision, checks and the report of `--dry_run`."""
