"""A name becomes a frozen SDXL pipeline: where its files lie, how it is loaded and quantised."""
