"""Loads a frozen SDXL pipeline by its name: locating its files, loading and quantising it."""
