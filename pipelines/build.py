"""Joins a trained tokenizer and a trained prior into a pipeline.

Usage: `python -m pipelines.build --tokenizer DIR --prior DIR --output_dir DIR`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import ConfigError, Problem, Section, run
from configs.folder_lock import locked_folder
from configs.hub import check_push, upload_errors
from configs.model_folder import local_folder
from configs.problems import one_line
from configs.run_folder import holds_work
from configs.sections import upload_problems
from configs.staging import finish_interrupted

if TYPE_CHECKING:
    from pipelines.pipeline_vqgan import VQGANPipeline


@dataclass(kw_only=True)
class BuildConfig(Section):
    """Joins the trained tokenizer and the trained prior into one pipeline folder.

    tokenizer: folder or Hub id of the tokenizer
    prior: output_dir of stage 2; an adapter is merged into its base prior
    output_dir: folder of the pipeline
    sampling_defaults: arguments of `VQGANPipeline.generate` and their values, such as "{guidance_scale: 1.5}"; generate
        and evaluate use them where an argument is left out. Without this key, a pipeline of the same weights in
        output_dir keeps its own, for instance those that `pipelines.tune` has chosen
    janus: also save the tokenizer as a JanusVQVAE of transformers, in the subfolder janus
    push_to_hub: upload the pipeline
    hub_model_id: repository of the upload, as "user/name"
    hub_private_repo: make a new repository private; null leaves this to the Hub
    license: license of the models, an identifier of the Hub such as apache-2.0; the model card states it
    """

    tokenizer: str
    prior: str
    output_dir: str
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    janus: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    license: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        yield from upload_problems(self)


def build(config: BuildConfig) -> "VQGANPipeline":
    """Builds and saves the pipeline, and uploads it if `push_to_hub`.

    Raises:
        ConfigError: the folder holds no trained prior, the prior was trained on codes of another tokenizer, or the
            pipeline cannot have these sampling defaults.
    """
    # These imports are slow, so they come after the check of the arguments.
    from configs.card_facts import run_license
    from pipelines import hub
    from pipelines.conditions import load_conditions
    from pipelines.pipeline_vqgan import VQGANPipeline
    from stage1_vqgan import load_image_processor, load_tokenizer
    from stage2_prior import TokenLayout, load_prior

    finish_interrupted(config.prior)
    if not (Path(config.prior) / "token_layout.json").is_file():
        message = f"received {config.prior!r}; this folder holds no trained prior (run stage2_prior.train first)"
        raise ConfigError([Problem("prior", message)])
    require_own_folder(config)
    if config.push_to_hub:
        check_push(str(config.hub_model_id), config.hub_private_repo, config.license)
    vqgan = load_tokenizer(config.tokenizer)
    try:
        prior, layout = load_prior(config.prior, "prior"), TokenLayout.from_pretrained(config.prior)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        message = f"received {config.prior!r}; its prior is incomplete (run stage2_prior.train to its end)"
        raise ConfigError([Problem("prior", message)]) from error
    except (OSError, ValueError) as error:
        message = f"received {config.prior!r}, which cannot be loaded: {one_line(error)}"
        raise ConfigError([Problem("prior", message)]) from error
    try:
        processor = load_image_processor(local_folder(config.tokenizer), vqgan.config)
    except (OSError, ValueError) as error:
        message = f"received {config.tokenizer!r}; its preprocessor_config.json is missing or cannot be read: {error}"
        raise ConfigError([Problem("tokenizer", message)]) from error
    try:
        conditions = load_conditions(Path(config.prior), layout)
    except (OSError, ValueError) as error:
        message = f"received {config.prior!r}; a tokenizer of its conditions cannot be loaded: {one_line(error)}"
        raise ConfigError([Problem("prior", message)]) from error
    try:
        layout.require_fingerprint(vqgan.config.fingerprint)
        layout.set_image_size(vqgan, processor)
        pipeline = VQGANPipeline(vqgan, prior, processor, layout, conditions)
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    try:
        pipeline.sampling_defaults = config.sampling_defaults
    except ValueError as error:
        raise ConfigError([Problem("sampling_defaults", str(error).removeprefix("sampling_defaults: "))]) from error
    license = config.license or run_license(Path(config.prior)) or run_license(Path(config.tokenizer))
    with locked_folder(config.output_dir, "output_dir"):
        facts = partial(add_facts, config)
        parts = pipeline.components | {"sampling_defaults": dict(pipeline.sampling_defaults) or None}  # None: kept
        hub.save(config.output_dir, **parts, janus=config.janus, add_facts=facts, license=license)
    print(f"pipeline saved in {Path(config.output_dir).resolve()}")
    if config.push_to_hub:
        with upload_errors(config.output_dir, config.hub_model_id):
            name, private = str(config.hub_model_id), config.hub_private_repo
            print(f"uploaded to {hub.push_saved(name, Path(config.output_dir), private)}")
    return pipeline


def add_facts(config: BuildConfig, folder: Path) -> None:
    """Writes what the folders of both runs tell about the training into the facts of the pipeline's card."""
    from configs.card_facts import collect_run
    from stage1_vqgan import model_card as tokenizer
    from stage2_prior import model_card as prior

    if Path(config.tokenizer).is_dir():
        collect_run(Path(config.tokenizer), folder, "tokenizer", tokenizer.PANELS, tokenizer.PICTURES)
    collect_run(Path(config.prior), folder, "prior", prior.PANELS, prior.PICTURES)


def require_own_folder(config: BuildConfig) -> None:
    """Refuses to build over the models themselves, over another run, or into a folder that holds something else.

    Raises:
        ConfigError: the pipeline would replace or join their files.
    """
    from pipelines.hub import require_place

    output = Path(config.output_dir).resolve()
    written = {output, output / "vqgan", output / "prior"}
    if holds_work(output) or written & {Path(part).resolve() for part in (config.tokenizer, config.prior)}:
        message = f"received {config.output_dir!r}, where the pipeline would replace files of a training run"
        raise ConfigError([Problem("output_dir", f"{message}; choose another folder")])
    try:
        require_place(output)
    except ValueError as error:
        raise ConfigError([Problem("output_dir", f"received {config.output_dir!r}; {error}")]) from error


if __name__ == "__main__":
    run(BuildConfig, build, "python -m pipelines.build")
