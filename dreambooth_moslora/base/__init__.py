"""The frozen base: found by its name, asked what it is, loaded, quantised and streamed."""
