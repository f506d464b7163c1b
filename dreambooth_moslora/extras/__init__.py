"""What a cluster, a service or a paper needs. The core imports nothing of it; its commands do."""
