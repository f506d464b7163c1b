"""Adapter files: raw and published, of diffusers and of kohya, what they say of themselves, and their proof."""
