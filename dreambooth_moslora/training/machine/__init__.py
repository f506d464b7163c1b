"""What a machine can do: its self-test, and the seconds and memory of a step of full-size SDXL."""
