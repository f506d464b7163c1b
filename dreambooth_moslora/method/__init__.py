"""The method: the mixer and its formula, adapters on a model, and their fast path."""
