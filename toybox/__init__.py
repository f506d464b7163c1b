"""A procedural toy world: captioned pictures of toys, without limit and without downloads."""
