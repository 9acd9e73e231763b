"""Converts tokenizers from and to other code bases: `python -m stage1_vqgan.convert`.

command.py is the command; taming.py, llamagen.py and diffusers.py each read one code base; verify.py compares.
"""
