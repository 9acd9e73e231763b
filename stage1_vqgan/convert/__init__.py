"""Tokenizers of other code bases, to and fro: `python -m stage1_vqgan.convert`."""
