"""Trains an adapter on photos: inputs, objective, step, loop, checkpoints, results of a run."""
