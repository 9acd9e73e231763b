"""Measures how close reconstructions are to their images: `accelerate launch -m stage1_vqgan.evaluate`."""
