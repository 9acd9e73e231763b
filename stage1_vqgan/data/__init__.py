"""Where images come from and how they become batches.

The path of an image: config → sources (files, splits, columns → indexed or streamed) → samplers → decoding →
augmentation → dataset → loading → transfer. skipped.py records the images that cannot be decoded.
"""
