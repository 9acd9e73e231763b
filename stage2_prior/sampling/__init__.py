"""Sampling codes from a prior: the loop, its decoders, options and memory."""
