"""Tokenizers of other code bases, to and fro: run as `python -m stage1_vqgan.convert --from taming --checkpoint FILE
--output DIR`."""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from configs import ConfigError, Problem, Section
from stage1_vqgan.convert import diffusers, llamagen, taming
from stage1_vqgan.convert.files import refuse
from stage1_vqgan.convert.original import Original, build_model
from stage1_vqgan.convert.verify import diffusers_cases, stored_cases, verify
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.pretrained import DISCRIMINATOR_NAME, load_tokenizer

READERS = {"taming": taming.read, "llamagen": llamagen.read, "diffusers": diffusers.read}
IMAGE_CHANNELS = (1, 3)  # gray, and RGB
NO_DIFFUSERS = "diffusers is not installed: pip install 'tessella[convert]'"


@dataclass(kw_only=True)
class ConvertConfig(Section):
    """Converts a tokenizer of another code base, or a tokenizer for another one.

    from: where the checkpoint is from: "taming" (CompVis/taming-transformers, also latent-diffusion's VQ models),
        "llamagen" or "diffusers"
    to: for what the checkpoint, a trained tokenizer, is converted: "diffusers"
    checkpoint: file of weights; for diffusers the folder of a VQModel; with `to`, folder or Hub id of a tokenizer
    config: the original's YAML or JSON; what it does not say is read from the weights
    output: folder to make
    verify: safetensors with inputs, codes and reconstructions of the original (io.input, io.indices, io.recon) to
        compare with; diffusers itself is run instead, on these inputs or on random ones
    """

    source: Literal["taming", "llamagen", "diffusers"] | None = field(default=None, metadata={"key": "from"})
    target: Literal["diffusers"] | None = field(default=None, metadata={"key": "to"})
    checkpoint: str
    config: str | None = None
    output: str
    verify: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if (self.source is None) == (self.target is None):
            yield "", None, "give either --from, where the checkpoint is from, or --to, for what it is converted"
        elif self.config is not None and "diffusers" in (self.source, self.target):
            yield "config", self.config, "the checkpoint is a folder with its own config.json; leave this out"


def convert(config: ConvertConfig) -> None:
    """Converts a tokenizer; a folder that is there at the end is whole and was compared as asked for.

    Raises:
        ConfigError: a file cannot be used, says two things, or the result is not the original.
    """
    with written_beside(Path(config.output)) as folder:
        report = export(config, folder) if config.source is None else bring_in(config, folder)
    print("\n".join([*report, f"saved in {Path(config.output).resolve()}"]))


def bring_in(config: ConvertConfig, folder: Path) -> list[str]:
    """Writes a tokenizer of another code base as one of ours; returns what to tell."""
    checkpoint = Path(config.checkpoint)
    original = READERS[str(config.source)](checkpoint, Path(config.config) if config.config else None)
    model = build_model(original)
    model.save_pretrained(folder)
    if model.config.in_channels in IMAGE_CHANNELS:
        VQGANImageProcessor(model.config.image_size, model.config.in_channels).save_pretrained(folder)
    if original.discriminator:
        save_file(original.discriminator, folder / DISCRIMINATOR_NAME)
    compared = compare(config, VQGANModel.from_pretrained(folder).eval(), checkpoint)
    return [*describe(model), *reading_notes(original, model), *compared]


def export(config: ConvertConfig, folder: Path) -> list[str]:
    """Writes a tokenizer for another code base; returns what to tell."""
    model = load_tokenizer(config.checkpoint, "checkpoint")
    notes = diffusers.write(model, folder)
    return [*describe(model), *notes, *compare(config, model, folder)]


def compare(config: ConvertConfig, model: VQGANModel, other: Path) -> list[str]:
    """The figures of the comparison with the original; `other` is the folder of diffusers, if that is the one."""
    path = Path(config.verify) if config.verify else None
    if "diffusers" not in (config.source, config.target):
        return ["not compared: no --verify FILE"] if path is None else verify(model, stored_cases(path, model))
    if find_spec("diffusers") is None:
        if path is not None:
            raise ConfigError([Problem("verify", NO_DIFFUSERS)])
        return [f"not compared: {NO_DIFFUSERS}"]
    return verify(model, diffusers_cases(other, path, model), allow_ties=True)


def describe(model: VQGANModel) -> list[str]:
    """A tokenizer in two lines."""
    config = model.config
    widths, sizes = ", ".join(map(str, config.widths)), ", ".join(map(str, config.attn_resolutions)) or "no"
    return [
        f"{config.num_embeddings} codes of width {config.embed_dim} ({config.quantizer}), one for "
        f"{config.downsampling_factor} × {config.downsampling_factor} pixels; images of {config.image_size} pixels, "
        f"{config.in_channels} channels",
        f"levels of {widths} channels, {config.num_res_blocks} residual blocks each, attention at {sizes} pixels; "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; fingerprint {config.fingerprint}",
    ]


def reading_notes(original: Original, model: VQGANModel) -> list[str]:
    """What a user should know of how the original was read."""
    notes = list(original.notes)
    if original.discriminator:
        notes.append(f"the discriminator is in {DISCRIMINATOR_NAME}: fine-tuning starts from it where it fits")
    if "image_size" not in {claim.field for claim in original.claims}:
        notes.append(f"no configuration tells image_size, which the weights do not: it is {model.config.image_size}")
    if model.config.in_channels not in IMAGE_CHANNELS:
        notes.append(f"images of {model.config.in_channels} channels have no image processor: give the model tensors")
    return notes


@contextlib.contextmanager
def written_beside(output: Path) -> Iterator[Path]:
    """An empty folder that becomes `output` at the end, or vanishes.

    Raises:
        ConfigError: there is something at `output` already.
    """
    output = output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise refuse("output", output, "there is something already; choose another folder, or remove it")
    above = next(path for path in output.parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=above) as beside:
        folder = Path(beside) / "folder"
        folder.mkdir()
        yield folder
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
