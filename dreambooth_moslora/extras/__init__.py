"""Tools for a cluster, a service or a paper. The core imports nothing of them; its commands do."""
