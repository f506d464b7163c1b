"""Training data: captioned renders, views, latents, each written in pieces."""
