"""CLIP guidance: latents of a tokenizer are optimised until their image resembles a text or an image."""
