"""The results of a run: adapter files, model card, samples, plots, and uploads to trackers and the hub."""
