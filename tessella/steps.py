"""The steps of `tessella run`: the command of each one, and how to tell that it has finished."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import ConfigError, Problem, load_config
from configs.yaml_files import to_yaml
from pipelines.evaluate import EvaluationConfig
from stage1_vqgan import Stage1Config
from stage2_prior import Stage2Config
from tessella.config import RunConfig

# Of an evaluation without and with a GPU: real images of each split, and generated images.
REAL_IMAGES, SAMPLES = (1000, 5000), (200, 2000)
NAMES = {"model.image_size": "size", "model.in_channels": "channels"}  # in a training, and here
MANY_GPUS = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
MOST_OF_A_CLASS, LEAST_OF_A_CLASS = 50, 4
GUIDANCE_SCALE = 1.5  # default of a pipeline with classes


@dataclass
class Step:
    """A step of the run.

    Attributes:
        name: of the command of `tessella`.
        preset: the first argument of the command, if it has one.
        keys: the other arguments, `{dotted key: value}`.
        result: file that exists when the step has finished.
        launched: whether several GPUs can share the work.
    """

    name: str
    preset: str | None
    keys: dict[str, Any]
    result: Path
    launched: bool = False

    @property
    def arguments(self) -> list[str]:
        """The arguments behind the name of the command."""
        options = [word for key, value in self.keys.items() for word in (f"--{key}", as_yaml(value))]
        return ([self.preset] if self.preset else []) + options

    def launcher(self, gpus: int) -> list[str]:
        """The options of `accelerate launch` for several GPUs; none for one process, which needs no launcher."""
        if not self.launched or gpus < 2:
            return []
        return [*MANY_GPUS, "--num_processes", str(gpus)]

    def command(self, gpus: int) -> str:
        """The command as a user would write it."""
        options = self.launcher(gpus)
        start = ["accelerate", "launch", *options, "-m", "tessella"] if options else ["tessella"]
        return shlex.join([*start, self.name, *self.arguments])


def as_yaml(value: Any) -> str:
    """A value as an argument of the command line."""
    text = to_yaml(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def presets(config: RunConfig, gpus: int) -> tuple[str, str]:
    """The presets of both trainings."""
    shorter = min(config.size, default=64) if isinstance(config.size, list) else config.size or 64
    size = next((side for side in (64, 128) if shorter <= side), 256)
    folder = f"own/{size}" if gpus else "own/cpu"
    return config.stage1 or f"{folder}/stage1", config.stage2 or f"{folder}/stage2"


def training_steps(config: RunConfig, gpus: int) -> list[Step]:
    """The steps that train: tokenizer, codes, prior. Their max_steps are those of the presets."""
    root, data = Path(config.output_dir), data_keys(config)
    stage1, stage2 = presets(config, gpus)
    model = {"model.image_size": config.size, "model.in_channels": config.channels}
    model = {key: value for key, value in model.items() if value is not None}
    tokenizer = {**data, "output_dir": str(root / "vqgan"), **model}
    prior = {
        **data,
        "tokenizer": str(root / "vqgan"),
        "code_store": str(root / "codes"),
        "output_dir": str(root / "prior"),
    }
    return [
        Step("train-tokenizer", stage1, tokenizer, root / "vqgan" / "train_results.json", launched=True),
        Step("tokenize", stage2, prior, root / "codes" / "manifest.json", launched=True),
        Step("train-prior", stage2, dict(prior), root / "prior" / "train_results.json", launched=True),
    ]


def data_keys(config: RunConfig) -> dict[str, Any]:
    """The keys of the images, as all steps but the building take them."""
    return {f"data.{key}": value for key, value in config.data_keys.items()}


def check(steps: list[Step]) -> None:
    """Checks the settings of both trainings before the first step, so that a later step does not fail hours later.

    Raises:
        ConfigError: with the problems of all steps.
    """
    problems: list[Problem] = []
    for step, kind in zip(steps, (Stage1Config, Stage2Config, Stage2Config), strict=True):
        try:
            load_config(kind, step.preset, step.keys)
        except ConfigError as error:
            found = [Problem(NAMES.get(problem.key, problem.key), problem.message) for problem in error.problems]
            problems += [problem for problem in found if problem not in problems]
    if problems:
        raise ConfigError(problems)


def building_step(config: RunConfig) -> Step:
    """The step that joins both models. With classes, the pipeline samples with guidance by default."""
    from stage2_prior import TokenLayout  # imports torch

    root = Path(config.output_dir)
    parts = {"tokenizer": root / "vqgan", "prior": root / "prior", "output_dir": root / "pipeline"}
    keys: dict[str, Any] = {key: str(path) for key, path in parts.items()}
    layout = TokenLayout.from_pretrained(str(root / "prior"))
    if layout.num_classes > 1 and layout.has_null:
        keys["sampling_defaults"] = {"guidance_scale": GUIDANCE_SCALE}
    return Step("build", None, keys, root / "pipeline" / "model_index.json")


def evaluation_step(config: RunConfig, gpus: int) -> Step:
    """The step that measures the pipeline and draws pictures. It fits the number of images and classes."""
    from stage2_prior.manifest import read_manifest  # imports torch

    root = Path(config.output_dir)
    manifest = read_manifest(root / "codes")
    classes = len(manifest["token_layout"]["class_names"])
    images = min(manifest["splits"]["train"]["images"], REAL_IMAGES[gpus > 0])
    share = SAMPLES[gpus > 0] // max(1, classes)
    keys = {
        **data_keys(config),
        "pipeline": str(root / "pipeline"),
        "output_dir": str(root),
        "samples_per_class": max(LEAST_OF_A_CLASS, min(MOST_OF_A_CLASS, share)) if classes else share,
        "max_real_images": REAL_IMAGES[gpus > 0],
        "num_components": min(EvaluationConfig.num_components, images),
        "tokenizer_run": str(root / "vqgan"),
        "code_store": str(root / "codes"),
        "prior_run": str(root / "prior"),
    }
    if classes == 1:  # a classifier needs two
        keys["data.use_labels"] = False
    return Step("evaluate", None, keys, root / "metrics.json", launched=True)


def push_step(config: RunConfig) -> Step:
    """The step that uploads the pipeline."""
    root = Path(config.output_dir)
    keys = {"folder": str(root / "pipeline"), "hub_model_id": config.push}
    if config.license is not None:
        keys["license"] = config.license
    return Step("push", None, keys, root / "pipeline")
