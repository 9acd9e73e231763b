"""Measurements of what the project claims to be fast at."""
