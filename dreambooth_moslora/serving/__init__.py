"""A service that draws pictures over HTTP: requests are checked, batched, and drawn by replicas on Ray Serve."""
