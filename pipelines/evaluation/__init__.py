"""Evaluation of generated images: `python -m pipelines.evaluate`."""
