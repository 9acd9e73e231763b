"""What the commands share that run both stages of a preset and its evaluation: folders, settings, arguments."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

# Of the generated images; the presets leave it to the pipeline, whose default is no guidance.
GUIDANCE_SCALE = 1.5


class Folders(NamedTuple):
    """The folders of the parts of a run."""

    tokenizer: Path
    codes: Path
    prior: Path
    pipeline: Path
    evaluation: Path

    @classmethod
    def within(cls, runs: Path) -> "Folders":
        """All in the folder `runs`."""
        return cls(*(runs / name for name in ("vqgan", "codes", "prior", "pipeline", "evaluation")))


def stage1_values(args: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Overrides of the preset of stage 1."""
    return training_values(args, folders.tokenizer) | args.stage1


def stage2_values(args: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Overrides of the preset of stage 2."""
    inputs = {"tokenizer": str(folders.tokenizer), "code_store": str(folders.codes)}
    return training_values(args, folders.prior) | inputs | args.stage2


def evaluation_values(args: argparse.Namespace, folders: Folders) -> dict[str, Any]:
    """Overrides of the preset of the evaluation."""
    inputs = {
        "pipeline": str(folders.pipeline),
        "tokenizer_run": str(folders.tokenizer),
        "code_store": str(folders.codes),
        "prior_run": str(folders.prior),
    }
    return common(args, folders.evaluation) | inputs | args.evaluate


def training_values(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The overrides that both stages share; no tracker of experiments."""
    return common(args, folder) | {"report_to": []}


def common(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The overrides that all parts share. Without `--data` the data set is that of the preset."""
    data = {} if args.data is None else {"data.dataset": args.data}
    return {"output_dir": str(folder), "dataloader_num_workers": args.num_workers, **data}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments with further settings of each part."""
    for name in ("--stage1", "--stage2", "--evaluate"):
        parser.add_argument(name, nargs="+", default=[], metavar="KEY=VALUE", help="further settings of it")


def read_settings(args: argparse.Namespace) -> None:
    """Converts these arguments to overrides, in place."""
    args.stage1, args.stage2, args.evaluate = map(overrides, (args.stage1, args.stage2, args.evaluate))


def overrides(items: Sequence[str]) -> dict[str, Any]:
    """Converts items `KEY=VALUE` of the command line to `{key: value}`."""
    return {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in items)}


def report(line: str) -> None:
    """Prints a line without buffering."""
    print(line, flush=True)
