"""Pictures over HTTP: requests are checked, gathered by adapter and size, and drawn by replicas on Ray Serve."""
