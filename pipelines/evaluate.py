"""Entry point: `accelerate launch -m pipelines.evaluate CONFIG [--key value ...]`."""

from typing import Any

from configs import run
from pipelines.evaluation.config import EvaluationConfig


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Evaluates a pipeline or a file of images, see `pipelines.evaluation.run.evaluate`.

    torch is imported here, because its import is slow and the check of the arguments must not wait for it.
    """
    from pipelines.evaluation import run as evaluation

    return evaluation.evaluate(config)


if __name__ == "__main__":
    run(EvaluationConfig, evaluate, "accelerate launch -m pipelines.evaluate")
