"""Adapter files: raw and published, of diffusers and of kohya, their metadata, and their verification."""
