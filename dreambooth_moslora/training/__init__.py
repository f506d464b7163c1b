"""Trains an adapter on photos: inputs, objective, step, loop, checkpoints, and the results of a
run."""
