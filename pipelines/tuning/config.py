"""Settings of a search for sampling settings."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

from configs import Section
from configs.sections import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, worker_problems
from stage1_vqgan import DataConfig

if TYPE_CHECKING:
    from pipelines.evaluation.config import EvaluationConfig

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
class TuneConfig(Section):
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
    seed: seed of the images, of the choice of candidates, and of the classifiers "cnn" and "resnet"
    output_dir: folder that keeps what was tried, so that the same command goes on after an interruption; null is the
        folder of the pipeline with "_tuning" behind its name
    feature_size, num_components, classifier, classifier_gamma, classifier_c, classifier_epochs: as in
        pipelines.evaluate
    max_real_images: upper limit of the real images of each split
    dataloader_num_workers: processes that decode the real images; 0 decodes in the main process
    code_store: folder of the codes; a prior with further conditions needs it, for the conditions of its validation
        images
    """

    positional = "pipeline"

    pipeline: str
    data: DataConfig
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
    seed: NonNegative = 0
    output_dir: str | None = None
    feature_size: Annotated[int, Ge(1), Le(4096)] = 8
    num_components: Positive = 24
    classifier: Literal["svc", "cnn", "resnet"] = "svc"
    classifier_gamma: PositiveFloat = 0.02
    classifier_c: PositiveFloat = 10.0
    classifier_epochs: Positive = 15
    max_real_images: Positive = 5000
    dataloader_num_workers: NonNegative = 0
    code_store: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from worker_problems(self)

    @property
    def folder(self) -> str:
        """The folder that keeps what was tried."""
        return self.output_dir or f"{self.pipeline.rstrip('/')}_tuning"

    @property
    def evaluation(self) -> "EvaluationConfig":
        """The settings by which `pipelines.evaluation` measures images in the same way."""
        from pipelines.evaluation.config import EvaluationConfig

        names = {field.name for field in fields(EvaluationConfig)} - {*TRIED, "output_dir"}
        shared: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name in names
        }
        return EvaluationConfig(output_dir=self.folder, **shared)
