"""Photos become an adapter: inputs, objective, step, loop, checkpoints, and what a run leaves."""
