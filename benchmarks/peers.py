"""Which peers are here."""

from collections.abc import Mapping
from importlib import import_module


def absent(modules: Mapping[str, str]) -> dict[str, str]:
    """Why those of the named peers that cannot be imported are left out.

    Args:
        modules: of each peer the module that has to be importable.
    """
    reasons = {}
    for peer, module in modules.items():
        try:
            import_module(module)
        except Exception as error:  # some fail on the versions of what they need, each in its own way
            reasons[peer] = f"{type(error).__name__}: {error}"
    return reasons
