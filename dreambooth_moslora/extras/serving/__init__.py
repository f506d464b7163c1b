"""A service that draws pictures over HTTP: requests are checked, batched, and drawn on Ray Serve."""
