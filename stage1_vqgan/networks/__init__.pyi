"""Frozen feature networks: what losses, discriminators and metrics see in an image."""

from .frozen import Activations as Activations, FrozenNetwork as FrozenNetwork
from .loading import load_network as load_network
