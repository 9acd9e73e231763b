"""Entry point that writes the code store: `accelerate launch -m stage2_prior.tokenize CONFIG [--key value ...]`."""

from typing import TYPE_CHECKING

from configs import run
from stage2_prior.training.config import Stage2Config

if TYPE_CHECKING:
    from stage2_prior.code_store import CodeStore


def tokenize(config: Stage2Config) -> "CodeStore":
    """Writes the code store of a configuration, see `stage2_prior.tokenization.tokenize`.

    torch is imported here, because its import is slow and the check of the arguments must not wait for it.
    """
    from stage2_prior import tokenization

    return tokenization.tokenize(config)


if __name__ == "__main__":
    run(Stage2Config, tokenize, "accelerate launch -m stage2_prior.tokenize")
