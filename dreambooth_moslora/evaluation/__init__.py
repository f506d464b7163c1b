"""Adapters become scores: metrics, encoders, reports and studies."""
