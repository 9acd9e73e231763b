"""Training of the tokenizer."""

from .run import train as train
