"""Scores adapters: metrics, encoders, reports and studies."""
