"""LoRA files: how they are written, proved and read, and how other tools spell their keys."""
