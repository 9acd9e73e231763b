"""Settings of a search for sampling settings."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

from configs.sections import Fraction, NonNegative, NonNegativeFloat, Positive
from pipelines.evaluation.config import ComparisonConfig

# The values that are tried for a key that is null.
TRIED: dict[str, list[Any]] = {
    "guidance_scale": [1.0, 1.25, 1.5, 2.0, 3.0],
    "guidance_schedule": ["constant", "linear", "cosine"],
    "temperature": [0.7, 0.8, 0.9, 1.0, 1.1],
    "top_k": [0, 16, 64, 256],
    "top_p": [0.8, 0.9, 0.95, 1.0],
    "min_p": [0.0, 0.02, 0.05, 0.1],
    "num_steps": [8, 12, 16, 24],
    "order_temperature": [1.0, 2.0, 4.5, 10.0, 20.0, 40.0],
}


@dataclass(kw_only=True)
class TuneConfig(ComparisonConfig):
    """Chooses sampling settings of a pipeline by a search, and saves them as its defaults.

    The best settings have the smallest Frechet distance to real images, at a class accuracy not below the present one.
    At an equal distance, the higher class accuracy is better, up to that of real images.

    pipeline: folder of the pipeline; with report_only, or a Hub id
    data: the real images; the training split trains the classifier and fits the principal components. One half of the
        validation split chooses the settings, the other half confirms them
    report_only: print what is best, and leave the pipeline as it is
    num_candidates: settings to try; chosen at random, if there are more
    num_samples: images of each of the best settings; in the first round, each setting makes a quarter
    guidance_scale: values to try, such as '[1, 1.5, 2]'; for null, this key and the next seven have some of their own
    guidance_schedule, temperature, top_k, top_p, min_p: the same. At most one of temperature, top_k, top_p and min_p
        differs from its standard value in a setting, because all of them make images more typical
    num_steps, order_temperature: the same, of a masked prior
    output_dir: folder that keeps what was tried, so that the same command goes on after an interruption; null is the
        folder of the pipeline with "_tuning" behind its name
    """

    positional = "pipeline"

    pipeline: str
    report_only: bool = False
    num_candidates: Positive = 48
    num_samples: Annotated[int, Ge(8), Le(2**20)] = 2000
    guidance_scale: Annotated[list[NonNegativeFloat], MinLen(1)] | None = None
    guidance_schedule: Annotated[list[Literal["constant", "linear", "cosine"]], MinLen(1)] | None = None
    temperature: Annotated[list[NonNegativeFloat], MinLen(1)] | None = None
    top_k: Annotated[list[NonNegative], MinLen(1)] | None = None
    top_p: Annotated[list[Annotated[float, Gt(0), Le(1)]], MinLen(1)] | None = None
    min_p: Annotated[list[Fraction], MinLen(1)] | None = None
    num_steps: Annotated[list[Positive], MinLen(1)] | None = None
    order_temperature: Annotated[list[NonNegativeFloat], MinLen(1)] | None = None
    output_dir: str | None = None

    @property
    def folder(self) -> str:
        """The folder that keeps what was tried."""
        return self.output_dir or f"{self.pipeline.rstrip('/')}_tuning"
