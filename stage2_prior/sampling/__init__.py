"""Sampling of codes from a prior: the loop, its decoders, its options, and the batch size that fits in memory."""
