"""Entry point that measures a tokenizer: `accelerate launch -m stage1_vqgan.evaluate TOKENIZER [--key value ...]`."""

from typing import Any

from configs import run
from stage1_vqgan.evaluation.config import ReconstructionConfig


def evaluate(config: ReconstructionConfig) -> dict[str, Any]:
    """Measures a tokenizer, see `stage1_vqgan.evaluation.run.evaluate`.

    torch is imported here, because its import is slow and the check of the arguments must not wait for it.
    """
    from stage1_vqgan.evaluation import run as evaluation

    return evaluation.evaluate(config)


if __name__ == "__main__":
    run(ReconstructionConfig, evaluate, "accelerate launch -m stage1_vqgan.evaluate")
