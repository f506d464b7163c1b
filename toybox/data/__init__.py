"""Training data: captioned renders, views and latents, each written in pieces."""
