"""Converts the priors of other projects: `python -m stage2_prior.convert`.

command.py is the command; taming.py reads a checkpoint and its configuration, settings.py holds the fields of that
configuration; gpt2.py writes the stock model.
"""
