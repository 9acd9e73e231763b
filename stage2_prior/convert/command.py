"""The command that converts priors of other code bases.

Run it as `python -m stage2_prior.convert --from taming --checkpoint FILE --output_dir DIR`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs import ConfigError, Problem
from configs.checksums import write_checksums
from stage1_vqgan import (
    ConvertConfig as TokenizerConfig,
    VQGANModel,
    import_tokenizer,
    load_tokenizer,
    written_beside,
)
from stage2_prior.convert.config import ConvertConfig
from stage2_prior.convert.gpt2 import build_gpt2
from stage2_prior.convert.taming import Original, read
from stage2_prior.vocabulary import TokenLayout

# Fingerprint in the layout of a prior whose tokenizer was not given. No tokenizer has it.
UNKNOWN = "unknown"


def convert(config: ConvertConfig, join: Callable[[str, Path, Path], object]) -> None:
    """Converts a prior. The output folder appears only after the whole conversion has succeeded.

    Args:
        config: the options.
        join: makes a pipeline of a tokenizer and a prior, as `pipelines.build`: `join(tokenizer, prior, folder)`.

    Raises:
        ConfigError: a file cannot be read, files contradict each other, or no stock model can compute this prior.
    """
    original = read(config)
    if original.has_tokenizer and config.tokenizer is not None:
        message = f"received {config.tokenizer!r}, but the checkpoint holds the tokenizer of this prior; leave it out"
        raise ConfigError([Problem("tokenizer", message)])
    with written_beside(Path(config.output_dir), "output_dir") as folder:
        tokenizer, model, lines = _tokenizer(config, original, folder.parent / "tokenizer")
        prior = folder if model is None else folder.parent / "prior"
        layout = layout_of(config, original, model)
        lines += _write_prior(original, layout, prior)
        if tokenizer is not None:
            join(tokenizer, prior, folder)
            layout.save_pretrained(folder / "prior")  # so that it can be fine-tuned
        kind = "prior" if tokenizer is None else "pipeline"
    print("\n".join([*lines, f"{kind} saved in {Path(config.output_dir).resolve()}"]))


def _tokenizer(
    config: ConvertConfig, original: Original, place: Path
) -> tuple[str | None, VQGANModel | None, list[str]]:
    """Folder or name of the tokenizer, the tokenizer itself, and lines to print; None if there is none."""
    if original.has_tokenizer:
        options = TokenizerConfig(
            source="taming", checkpoint=config.checkpoint, config=original.tokenizer_config, output=str(place)
        )
        return str(place), *import_tokenizer(options, place)
    if config.tokenizer is None:
        advice = (
            f"its layout names the tokenizer {UNKNOWN!r}; pipelines.build refuses it. Convert it again with --tokenizer"
        )
        return None, None, [f"the checkpoint holds no tokenizer: only the prior is converted, and {advice}"]
    return config.tokenizer, load_tokenizer(config.tokenizer), []


def layout_of(config: ConvertConfig, original: Original, tokenizer: VQGANModel | None) -> TokenLayout:
    """The token layout of a converted prior: its codes, then its classes. Class c has the name of its number.

    Raises:
        ConfigError: the tokenizer does not fit the prior, or facts that a missing tokenizer would state are not given.
    """
    vocab = original.sizes["vocab_size"]
    facts: dict[str, Any] = {"grid": config.grid, "downsampling_factor": config.downsampling_factor}
    num_codes, fingerprint, problems = vocab, UNKNOWN, []
    if tokenizer is not None:
        has = tokenizer.config
        num_codes, fingerprint = has.num_embeddings, str(has.fingerprint)
        problems = _tokenizer_problems(config, tokenizer, vocab)
        facts = {"grid": config.grid or has.grid, "downsampling_factor": has.downsampling_factor}
    problems += [
        Problem(name, "the checkpoint holds no tokenizer, which states it; give it, or --tokenizer")
        for name, value in facts.items()
        if value is None
    ]
    if problems:
        raise ConfigError(problems)
    layout = TokenLayout(
        num_codes=num_codes,
        class_names=tuple(map(str, range(original.num_classes))),
        tokenizer_fingerprint=fingerprint,
        has_null=original.num_classes == 0,
        **facts,
    )
    if layout.num_positions > (places := original.sizes["block_size"]):
        message = f"received {list(layout.grid)}, {layout.length} codes; this prior has positions for {places}"
        raise ConfigError([Problem("grid", message)])
    return layout


def _tokenizer_problems(config: ConvertConfig, tokenizer: VQGANModel, vocab: int) -> list[Problem]:
    has, problems = tokenizer.config, []
    if has.num_embeddings > vocab:
        problems.append(Problem("tokenizer", f"has {has.num_embeddings} codes; this prior has {vocab} tokens"))
    if len(has.grids) > 1 or has.grids[0][2] > 1:
        problems.append(Problem("tokenizer", "has several codes at a position; these priors have one"))
    if config.downsampling_factor not in (None, has.downsampling_factor):
        received, advice = config.downsampling_factor, "leave it out"
        message = f"received {received}, but the tokenizer has {has.downsampling_factor}; {advice}"
        problems.append(Problem("downsampling_factor", message))
    return problems


def _write_prior(original: Original, layout: TokenLayout, folder: Path) -> list[str]:
    """Writes the folder of the prior; returns lines to print."""
    model = build_gpt2(original, layout)
    model.save_pretrained(folder)
    layout.save_pretrained(folder)
    write_checksums(folder)
    vocab, classes = original.sizes["vocab_size"], layout.num_classes
    condition = f"{classes} classes" if classes else f"unconditional, started by code {original.start_code}"
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"prior: a GPT-2 of {count:,} parameters, {layout.codes_text} codes out of {layout.num_codes}, {condition}"
    ]
    if vocab > layout.num_codes:
        lines.append(f"left out: {vocab - layout.num_codes} tokens of the prior, which are no codes of the tokenizer")
    return [*lines, *original.notes]
