"""The command that converts tokenizers from and to other code bases.

Run it as `python -m stage1_vqgan.convert --from taming --checkpoint FILE --output DIR`.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import save_file

from configs import ConfigError, Problem
from configs.checksums import write_checksums
from configs.disk_space import naming_full_disk
from configs.files import new_file_mode, sync_folder, sync_tree
from stage1_vqgan.convert import diffusers, janus, llamagen, taming
from stage1_vqgan.convert.config import ConvertConfig
from stage1_vqgan.convert.files import refuse
from stage1_vqgan.convert.original import Original, build_model
from stage1_vqgan.convert.verify import library_cases, stored_cases, verify
from stage1_vqgan.image_processing_vqgan import VQGANImageProcessor
from stage1_vqgan.modeling_vqgan import VQGANModel
from stage1_vqgan.pretrained import DISCRIMINATOR_NAME, load_tokenizer, load_vqgan

READERS = {"taming": taming.read, "llamagen": llamagen.read, "diffusers": diffusers.read, "janus": janus.read}
WRITERS = {"diffusers": diffusers.write, "janus": janus.write}
# Code bases that are installed libraries: the comparison runs them.
REFERENCES = {"diffusers": diffusers.reference, "janus": janus.reference}
NO_DIFFUSERS = "diffusers is not installed: pip install 'tessella[convert]'"


def convert(config: ConvertConfig) -> None:
    """Converts a tokenizer. The output folder appears only after the conversion and the comparison have succeeded.

    Raises:
        ConfigError: a file cannot be read, files contradict each other, or the result differs from the original.
    """
    with written_beside(Path(config.output)) as folder:
        report = export(config, folder) if config.source is None else bring_in(config, folder)
    print("\n".join([*report, f"saved in {Path(config.output).resolve()}"]))


def bring_in(config: ConvertConfig, folder: Path) -> list[str]:
    """Converts a tokenizer of another code base to a `VQGANModel`; returns lines to print."""
    model, notes = import_tokenizer(config, folder)
    return [*notes, *compare(config, model, Path(config.checkpoint))]


def import_tokenizer(config: ConvertConfig, folder: Path) -> tuple[VQGANModel, list[str]]:
    """Writes the folder of a tokenizer that another code base has trained; returns the tokenizer and lines to print.

    Raises:
        ConfigError: a file cannot be read, or files contradict each other.
    """
    checkpoint = Path(config.checkpoint)
    original = READERS[str(config.source)](checkpoint, Path(config.config) if config.config else None)
    model = build_model(original, config.image_size)
    model.save_pretrained(folder)
    try:
        processor = VQGANImageProcessor(model.config.image_size, model.config.in_channels)
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from None
    processor.save_pretrained(folder)
    if original.discriminator:
        save_file(original.discriminator, folder / DISCRIMINATOR_NAME)
    write_checksums(folder)
    model = load_vqgan(folder)
    return model, [*describe(model), *reading_notes(original, model, config.image_size is not None)]


def export(config: ConvertConfig, folder: Path) -> list[str]:
    """Converts a `VQGANModel` to another code base; returns lines for the user."""
    changes = {} if config.image_size is None else {"image_size": config.image_size}
    model = load_tokenizer(config.checkpoint, "checkpoint", **changes)
    notes = WRITERS[str(config.target)](model, folder)
    return [*describe(model), *notes, *compare(config, model, folder)]


def compare(config: ConvertConfig, model: VQGANModel, other: Path) -> list[str]:
    """Compares a tokenizer with the original, if possible; returns lines for the user.

    Args:
        config: names the code base and the file to compare with.
        model: the tokenizer.
        other: for diffusers and janus, the tokenizer in their form; unused otherwise.
    """
    path, kind = Path(config.verify) if config.verify else None, str(config.source or config.target)
    if kind not in REFERENCES:
        return ["not compared: no --verify FILE"] if path is None else verify(model, stored_cases(path, model))
    if kind == "diffusers" and find_spec("diffusers") is None:
        if path is not None:
            raise ConfigError([Problem("verify", NO_DIFFUSERS)])
        return [f"not compared: {NO_DIFFUSERS}"]
    return verify(model, library_cases(REFERENCES[kind](other, model), path, model), allow_ties=True)


def describe(model: VQGANModel) -> list[str]:
    """Describes a tokenizer in two lines."""
    config = model.config
    widths, sizes = ", ".join(map(str, config.widths)), "×".join(map(str, config.image_shape))
    attends = ", ".join(map(str, config.attn_levels or ())) or "none"
    return [
        f"{config.num_embeddings} codes of width {config.embed_dim} ({config.quantizer}), one for "
        f"{config.downsampling_factor} × {config.downsampling_factor} pixels; images of {sizes} pixels, "
        f"{config.in_channels} channels",
        f"levels of {widths} channels, {config.num_res_blocks} residual blocks each, attention in levels: {attends}; "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; fingerprint {config.fingerprint}",
    ]


def reading_notes(original: Original, model: VQGANModel, is_resized: bool) -> list[str]:
    """What the user should know about how the original was read, as lines."""
    notes = list(original.notes)
    if original.discriminator:
        notes.append(f"the discriminator is in {DISCRIMINATOR_NAME}: fine-tuning starts from it where it fits")
    if not is_resized and "image_size" not in {claim.field for claim in original.claims}:
        notes.append(f"neither a configuration nor the weights state image_size: it is {model.config.image_size}")
    return notes


@contextlib.contextmanager
def written_beside(output: Path, field: str = "output") -> Iterator[Path]:
    """A new temporary folder, which is renamed to `output` on success and removed on an error, with all beside it.

    Args:
        output: the folder to create.
        field: configuration field that names it, for the error.

    Raises:
        ConfigError: `output` is a file or a folder that is not empty.
    """
    output = output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise refuse(field, output, "it exists already; choose another folder, or remove it")
    above = next(path for path in output.parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=above) as beside:
        folder = Path(beside) / "folder"
        folder.mkdir()
        with naming_full_disk(output):
            yield folder
            new_file_mode(folder)
            sync_tree(folder)
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(output)
        sync_folder(output.parent)
