"""Service that draws pictures over HTTP.

Requests are checked, batched, and drawn on Ray Serve.
"""
