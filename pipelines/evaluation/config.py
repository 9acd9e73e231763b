"""Settings of an evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from configs import Section
from configs.sections import NonNegative, NonNegativeFloat, Positive, PositiveFloat, worker_problems
from pipelines.commands import UnmaskingSettings
from pipelines.evaluation.generation_config import GenerationMetricsConfig
from stage1_vqgan import DataConfig


@dataclass(kw_only=True)
class ComparisonConfig(Section):
    """How generated images are compared with real ones, in an evaluation and in a search for sampling settings.

    data: the real images
    seed: seed of the generated images, of the classifiers "cnn" and "resnet", and of the settings that a search tries
    feature_size: side in pixels to which area averaging reduces the images before they are compared
    num_components: number of principal components in the Frechet distance
    classifier: "svc", a support vector classifier of the averaged images; "cnn", three convolutions, which suffice for
        small gray images; or "resnet", which colour photos need
    classifier_gamma, classifier_c: parameters of "svc", as in scikit-learn
    classifier_epochs: training epochs of "cnn" and "resnet", which see mirrored images if
        data.augmentation.horizontal_flip
    max_real_images: upper limit of the real images of each split
    dataloader_num_workers: processes that decode the real images; 0 decodes in the main process
    code_store: folder of the codes that the prior was trained on. The copying check compares with all views of the
        images in it. A prior with further conditions needs it: it is asked for the conditions of its validation images.
        Settings of `data` with which its training images would be measured as held out ones are refused
    """

    data: DataConfig
    seed: NonNegative = 0
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


@dataclass(kw_only=True)
class EvaluationConfig(UnmaskingSettings, ComparisonConfig):
    """Compares the images that a pipeline generates, or those in a file, with real images.

    pipeline: folder or Hub id of the pipeline
    samples: .npz file of images to evaluate in place of a pipeline: arr_0, uint8 (N, H, W, 3), and optionally arr_1,
        the class of each image, counted from 0 in the order of the classes of the data set
    export: .npz file to write the evaluated images to, in the same form
    data: the real images; the training split trains the classifier and fits the principal components, the metrics
        compare the generated images with the validation split
    metrics: the metrics in the features of networks
    output_dir: folder for metrics.json, samples.png and reconstructions.png; the evaluated images are in its folder
        samples
    samples_per_class: images to generate for each class; for an unconditional pipeline, images to generate in all
    guidance_scale: guidance scale of the generated images; 1 is no guidance. By default that of the pipeline, see
        `pipelines.tune`
    grid_columns: number of images of each class in samples.png
    tokenizer_run, prior_run: folders of the trainings; the metrics include the durations that these and the code store
        have recorded
    """

    preset: ClassVar[str] = "evaluate"
    displaces: ClassVar[dict[str, str]] = {"samples": "pipeline"}

    pipeline: str | None = None
    samples: str | None = None
    export: str | None = None
    metrics: GenerationMetricsConfig = field(default_factory=GenerationMetricsConfig)
    output_dir: str
    samples_per_class: Positive = 50
    guidance_scale: NonNegativeFloat | None = None
    grid_columns: Positive = 10
    tokenizer_run: str | None = None
    prior_run: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if (self.pipeline is None) == (self.samples is None):
            yield "pipeline", self.pipeline, "give either this, or samples"
        if self.export is not None and not self.export.endswith(".npz"):
            yield "export", self.export, "must be the name of an .npz file, such as samples.npz"
        yield from super().problems()
