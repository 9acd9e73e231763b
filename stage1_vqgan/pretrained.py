"""A trained tokenizer by its name, for the commands that need one."""

from typing import Any

from configs import ConfigError, Problem
from stage1_vqgan.modeling_vqgan import VQGANModel


def load_tokenizer(name: str, key: str = "tokenizer", **changes: Any) -> VQGANModel:
    """The tokenizer in a folder or Hub repository, in evaluation mode on the CPU.

    Args:
        name: folder or Hub id.
        key: of the configuration that named it, for the message.
        changes: fields of its configuration to change.

    Raises:
        ConfigError: there is none, or its weights do not fit.
    """
    try:
        return VQGANModel.from_pretrained(name, **changes).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"received {name!r}; no tokenizer can be loaded from there (stage1_vqgan.train makes one): {reason}"
        raise ConfigError([Problem(key, message)]) from error
