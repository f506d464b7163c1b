"""Procedural toy world: captioned pictures of toys, in any number and without downloads."""
