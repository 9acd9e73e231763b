"""Training of the prior."""

from .run import train as train
