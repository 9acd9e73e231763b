"""Converts tokenizers from and to other code bases: `python -m stage1_vqgan.convert`.

command.py is the command; taming.py, llamagen.py, diffusers.py and janus.py each know one code base; unwrap.py finds
the tokenizer in a file; verify.py compares.
"""
