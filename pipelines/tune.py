"""Entry point: `python -m pipelines.tune PIPELINE --data.dataset DATA [--key value ...]`."""

from typing import Any

from configs import run
from pipelines.tuning.config import TuneConfig


def tune(config: TuneConfig) -> dict[str, Any]:
    """Chooses sampling settings, see `pipelines.tuning.run.tune`.

    torch is imported here, because its import is slow and the check of the arguments must not wait for it.
    """
    from pipelines.tuning import run as tuning

    return tuning.tune(config)


if __name__ == "__main__":
    run(TuneConfig, tune, "python -m pipelines.tune")
