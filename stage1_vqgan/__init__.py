"""Stage 1: the VQGAN tokenizer, its data and its training."""

import lazy_loader

# The public names stand in __init__.pyi; each is imported on first use, so that importing the package stays fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
