"""What a run leaves: adapter files, model card, samples, plots, and what goes to trackers and the hub."""
