"""Measuring attention where it runs: recorders, and what they read."""
