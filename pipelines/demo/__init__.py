"""The demo app: a web page on which people try a pipeline."""
