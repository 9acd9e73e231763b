"""What each part of a preset contributes: `python -m benchmarks.ablation digits [--seeds 0 1 2] [--variants ...]`.

Trains both stages of the preset and evaluates them: once as it is, the base line, and once for each variant. A variant
changes one thing, see `PARTS`. All of this is done for each seed, which seeds both trainings, the views of the code
store and the sampling. So variants of the same seed start from the same random numbers, and are compared in pairs.
Images are sampled with guidance 1.5; `--evaluate guidance_scale=...` overrides it for all variants.

`FAULTS` are further variants, each with a fault that is made on purpose. Their figures show how it is recognised:
`--variants tokenizer_stopped prior_stopped ...`.

Variants that change nothing in stage 1 use the tokenizer of the base line of their seed, and also its codes if they
keep the number of views. A variant that the preset refuses, or that changes nothing there, is named and left out.

The tables give the mean of each figure ± its sample standard deviation over the seeds; and the mean of the differences
from the base line of the same seed ± the standard error of this mean. The last table says which differences are clear.
- `bits_per_pixel` is that of the prior, of validation codes. Codes of another tokenizer are not comparable, so this
  figure then has no difference.
- `cpu_seconds` are those of both trainings and of the codes, without the evaluation. A shared tokenizer counts in
  full, and what a killed process had spent does not count.

The same command goes on after an interruption, and repeats no finished run. A run has a folder in `--output_dir`, in
which `ablation.json` collects the results, and `variants.png` shows images of each variant. TQDM_MININTERVAL=60 reduces
the progress bars to one line per minute.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cpu_time import complete, seconds_of
from benchmarks.differences import Comparison, all_tables, compare
from benchmarks.machine import environment
from benchmarks.report import write
from benchmarks.stages import (
    GUIDANCE_SCALE,
    Folders,
    add_settings,
    evaluation_values,
    read_settings,
    report,
    stage1_values,
    stage2_values,
)
from configs import ConfigError, Problem, load_config, to_dict
from configs.files import write_json, write_png
from configs.interruption import Stopped
from configs.problems import one_line
from configs.run_folder import RESULTS_NAME
from pipelines.build import BuildConfig, build
from pipelines.evaluate import EvaluationConfig, evaluate
from pipelines.evaluation.reading import some_pixels
from pipelines.evaluation.shards import ImageShards
from stage1_vqgan import Stage1Config, VQGANImageProcessor, labelled_grid, spread
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import Stage2Config
from stage2_prior.manifest import MANIFEST_NAME
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior


@dataclass(frozen=True)
class Variant:
    """What a variant changes.

    Attributes:
        stage1, stage2: overrides of the presets.
        architecture: `model_type` of the prior, in the sizes of the preset's; None keeps the preset's.
        sampling: arguments of `VQGANPipeline.generate`, beside guidance 1.5.
    """

    stage1: dict[str, Any] = field(default_factory=dict)
    stage2: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


BASE = "baseline"
PARTS = {
    "no_discriminator": Variant({"loss.adversarial_weight": 0}),
    "no_perceptual": Variant({"loss.perceptual_weight": 0}),
    "perceptual": Variant({"loss.perceptual_weight": 1.0, "loss.lpips_backbone": "stlpips_alex"}),
    # the same network; enlarges images that are too small for it
    "features": Variant(
        {"loss.perceptual_weight": 0, "loss.features_weight": 1.0, "loss.features_network": "stlpips/alex@32"}
    ),
    "tokenizer_no_ema": Variant({"ema_decay": 0}),
    "prior_no_ema": Variant(stage2={"ema_decay": 0}),
    "one_view": Variant(stage2={"num_views": 1}),
    "codebook_64": Variant({"model.num_embeddings": 64}),
    "codebook_1024": Variant({"model.num_embeddings": 1024}),
    "qwen3": Variant(architecture="qwen3"),
    "gpt2": Variant(architecture="gpt2"),
}
SHORT = {"max_steps": 30, "warmup_steps": 0.1, "eval_steps": 1000, "save_steps": 1000}
FAULTS = {
    "tokenizer_stopped": Variant(SHORT),
    "codebook_2": Variant({"model.num_embeddings": 2}),
    "prior_stopped": Variant(stage2=SHORT | {"max_steps": 100}),
    "no_class": Variant(stage2={"condition_dropout": 0.9}),
    "prior_overtrained": Variant(
        stage2={"num_views": 1, "data.augmentation": {}, "keep_best": False, "weight_decay": 0.0}
    ),
    "guidance_6": Variant(sampling={"guidance_scale": 6.0}),
    "temperature_half": Variant(sampling={"temperature": 0.5}),
    "temperature_2": Variant(sampling={"temperature": 2.0}),
}
VARIANTS = {BASE: Variant(), **PARTS, **FAULTS}
# Settings of stage 2 above that change the codes.
OF_CODES = {"num_views", "data.augmentation"}

IMAGES_SHOWN = 20  # of each variant

# Figures of the tables and their digits; also those of networks, whose names begin with "frechet_distance/".
FIGURES = {
    "psnr": 2,
    "codebook_usage": 3,
    "bits_per_pixel": 4,
    "frechet_distance": 3,
    "class_accuracy": 4,
    "classification_accuracy_score": 4,
    "suspected_copies": 3,
    "cpu_seconds": 0,
}


class Settings(NamedTuple):
    """The settings of a variant with one seed."""

    stage1: Stage1Config
    stage2: Stage2Config
    build: BuildConfig
    evaluation: EvaluationConfig


def settings(args: argparse.Namespace, variant: Variant, seed: int, folders: Folders) -> Settings:
    """The settings of a run in these folders.

    Raises:
        ConfigError: the preset refuses them.
    """
    seeded = {"seed": seed}
    stage1 = stage1_values(args, folders) | variant.stage1 | seeded
    stage2 = stage2_values(args, folders) | variant.stage2 | seeded
    evaluation = evaluation_values(args, folders) | seeded
    if variant.architecture is not None:
        prior = load_config(Stage2Config, f"{args.preset}/stage2", stage2).model
        stage2["model"] = architecture(variant.architecture, prior)
    return Settings(
        load_config(Stage1Config, f"{args.preset}/stage1", stage1),
        load_config(Stage2Config, f"{args.preset}/stage2", stage2),
        BuildConfig(
            tokenizer=str(folders.tokenizer),
            prior=str(folders.prior),
            output_dir=str(folders.pipeline),
            sampling_defaults={"guidance_scale": GUIDANCE_SCALE, **variant.sampling},
        ),
        load_config(EvaluationConfig, f"{args.preset}/evaluate", evaluation),
    )


def architecture(model_type: str, llama: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of another prior that has as many weights, to about 1 %, as a Llama.

    Raises:
        ConfigError: `llama` is another architecture.
    """
    if llama["model_type"] != "llama":
        raise ConfigError([Problem("model.model_type", f"received {llama['model_type']!r}; the variant needs llama")])
    width, heads, inner = (llama[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size"))
    if model_type == "qwen3":
        return {"num_key_value_heads": heads, "head_dim": width // heads, **llama, "model_type": model_type}
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": llama["num_hidden_layers"],
        "n_head": heads,
        "n_inner": 3 * inner // 2,  # it has two matrices in place of three
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": llama.get("attention_dropout", 0.0),
        "tie_word_embeddings": False,
    }


def chosen(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The variants to run, the base line first; and why others are left out.

    Raises:
        ConfigError: the base line cannot have its settings.
    """
    anywhere = Folders.within(args.output_dir)
    base = settings(args, VARIANTS[BASE], 0, anywhere)
    left_out = {}
    for name in args.variants:
        try:
            if settings(args, VARIANTS[name], 0, anywhere) == base:
                left_out[name] = "the base line is like this"
        except ConfigError as error:
            left_out[name] = one_line(error)
    return [BASE, *(name for name in args.variants if name not in left_out)], left_out


def folders_of(runs: Path, name: str) -> Folders:
    """The folders of a variant in the folder of a seed: some are those of the base line."""
    variant, base, own = VARIANTS[name], Folders.within(runs / BASE), Folders.within(runs / name)
    if variant.stage1:
        return own
    codes = own.codes if OF_CODES & variant.stage2.keys() else base.codes
    prior = own.prior if variant.stage2 or variant.architecture else base.prior
    return own._replace(tokenizer=base.tokenizer, codes=codes, prior=prior)


def measured(args: argparse.Namespace, name: str, seed: int) -> dict[str, float]:
    """Trains and evaluates a variant, unless that was done with these settings; returns its figures.

    Raises:
        ConfigError, Stopped, Diverged: see the functions of the parts.
    """
    runs = args.output_dir / f"seed_{seed}"
    folders, path = folders_of(runs, name), runs / name / "run.json"
    run = settings(args, VARIANTS[name], seed, folders)
    wanted = {part: to_dict(config) for part, config in run._asdict().items()}
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("settings") == wanted:
        return known["figures"]
    complete(folders.tokenizer, RESULTS_NAME, partial(train_tokenizer, run.stage1))
    complete(folders.codes, MANIFEST_NAME, partial(tokenize, run.stage2))
    complete(folders.prior, RESULTS_NAME, partial(train_prior, run.stage2))
    build(run.build)
    metrics = evaluate(run.evaluation)
    del metrics["inputs"]
    figures = figures_of(folders, metrics)
    write_json(path, {"environment": environment(), "settings": wanted, "figures": figures, "metrics": metrics})
    return figures


def figures_of(folders: Folders, metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a finished run; those that it does not have are missing."""
    parts = (folders.tokenizer, folders.codes, folders.prior)
    spent = sum(seconds_of(part) for part in parts)
    prior = json.loads((folders.prior / RESULTS_NAME).read_text())
    known = {**metrics, "bits_per_pixel": prior.get("bits_per_pixel"), "cpu_seconds": spent}
    names = [*FIGURES, *(name for name in metrics if name.startswith("frechet_distance/"))]
    return {name: known[name] for name in names if known.get(name) is not None}


def comparisons(results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, dict[str, Comparison]]:
    """Compares all variants with the base line: by figure, then by variant.

    Args:
        results: figures by variant and seed; figures may be missing.
    """
    found = dict.fromkeys(name for runs in results.values() for figures in runs.values() for name in figures)
    return {
        figure: {
            name: compare(values, base_of(name, figure, results))
            for name, runs in results.items()
            if (values := of_seeds(runs, figure))
        }
        for figure in dict.fromkeys([*(name for name in FIGURES if name in found), *found])
    }


def base_of(name: str, figure: str, results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[int, float]:
    """What a figure of a variant is compared with, by seed; nothing if it cannot be compared."""
    has_other_codes = figure == "bits_per_pixel" and VARIANTS[name].stage1
    return {} if name == BASE or has_other_codes else of_seeds(results[BASE], figure)


def of_seeds(runs: Mapping[int, Mapping[str, float]], figure: str) -> dict[int, float]:
    """A figure by seed."""
    return {seed: figures[figure] for seed, figures in runs.items() if figure in figures}


def save_picture(runs: Path, names: Sequence[str], path: Path) -> None:
    """Writes a picture of images of variants, evenly spread over the classes: a row for each, with equal seeds.

    Args:
        runs: the folder of a seed.
        names: the variants.
        path: where to write.
    """
    rows = []
    for name in names:
        folders = folders_of(runs, name)
        images = ImageShards(folders.evaluation / "samples")
        pixels = some_pixels(images, spread(len(images), IMAGES_SHOWN))
        rows.append((name, VQGANImageProcessor.from_pretrained(folders.tokenizer).postprocess(pixels)))
    write_png(path, labelled_grid(rows, IMAGES_SHOWN, min_tile=32))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="digits, fashion_mnist, or another folder with the three presets")
    parser.add_argument("--data", help="folder of the images, or another value of data.dataset; else the preset's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=[*PARTS, *FAULTS], default=list(PARTS))
    parser.add_argument("--num_workers", type=int, default=0)
    add_settings(parser)
    parser.add_argument("--output_dir", type=Path, help="default: runs/benchmarks/ablation/PRESET")
    args = parser.parse_args(arguments)
    args.output_dir = args.output_dir or Path("runs/benchmarks/ablation", args.preset)
    read_settings(args)
    try:
        run_all(args)
    except (ConfigError, Stopped) as error:
        report(str(error))
        sys.exit(error.exit_code if isinstance(error, Stopped) else 2)


def run_all(args: argparse.Namespace) -> None:
    """Does all runs, seed by seed. After each it prints the figures and saves all results; at the end, the tables."""
    where, (names, left_out) = environment(), chosen(args)
    for name, reason in left_out.items():
        report(f"left out: {name} ({reason})")
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    for seed in args.seeds:
        for name in names:
            figures = results[name][seed] = measured(args, name, seed)
            report(f"{name}, seed {seed}: {', '.join(f'{key} {value:.4g}' for key, value in figures.items())}")
            compared = comparisons(results)
            write(
                args.output_dir / "ablation.json",
                {
                    "environment": where,
                    "arguments": vars(args) | {"output_dir": str(args.output_dir)},
                    "variants": {name: asdict(VARIANTS[name]) for name in names},
                    "left_out": left_out,
                    "results": results,
                    "comparisons": {
                        figure: {name: asdict(one) for name, one in variants.items()}
                        for figure, variants in compared.items()
                    },
                },
            )
    save_picture(args.output_dir / f"seed_{args.seeds[0]}", names, args.output_dir / "variants.png")
    report(all_tables(compared, FIGURES))


if __name__ == "__main__":
    main()
