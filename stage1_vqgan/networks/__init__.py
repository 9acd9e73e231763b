"""Frozen feature networks: what losses, discriminators and metrics see in an image."""

from stage1_vqgan.networks.frozen import Activations, FrozenNetwork
from stage1_vqgan.networks.loading import load_network

__all__ = ["Activations", "FrozenNetwork", "load_network"]
