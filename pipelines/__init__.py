"""The pipeline: prior and tokenizer together, images out."""

import lazy_loader

# The public names stand in __init__.pyi; each is imported on first use, so that importing the package stays fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
