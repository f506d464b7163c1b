"""What a machine can do: a self-test, and the time and memory of a training step of full-size SDXL."""
