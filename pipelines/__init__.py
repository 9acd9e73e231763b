"""The pipeline: the prior samples codes, the tokenizer decodes them into images."""

import lazy_loader

from stage1_vqgan import import_own

import_own("configs")
# __init__.pyi lists the public names. Python imports each one on first use, so `import` of this package stays fast.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
