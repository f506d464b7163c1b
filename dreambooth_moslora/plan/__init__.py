"""What is known before a run: its steps, memory, choices and checks."""
