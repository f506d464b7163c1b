"""Scores adapters: metrics, encoders, reports, and photos made from one."""
