"""Serving the page to several users: identity, limits of requests, and uploads."""
