"""Choice of sampling settings by search: `python -m pipelines.tune`."""
