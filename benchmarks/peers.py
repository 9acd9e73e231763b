"""Finds the peers that are not installed."""

from collections.abc import Mapping
from importlib import import_module


def absent(modules: Mapping[str, str]) -> dict[str, str]:
    """The peers that cannot be imported, and the reason for each.

    Args:
        modules: for each peer, the name of its module.
    """
    reasons = {}
    for peer, module in modules.items():
        try:
            import_module(module)
        except Exception as error:  # an incompatible version of a dependency can raise any exception
            reasons[peer] = f"{type(error).__name__}: {error}"
    return reasons
