"""Converts the priors of other projects: `python -m stage2_prior.convert`.

command.py is the command; taming.py reads a checkpoint, settings.py its configuration; gpt2.py makes the stock model.
"""
