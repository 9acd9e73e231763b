"""The command `tessella`: a table of commands, each of them an entry point of another package."""

import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from configs import command_line
from configs.ctrl_c import ctrl_c
from configs.problems import did_you_mean, nearest, shown
from stage1_vqgan import import_own
from tessella import __version__


class Command(NamedTuple):
    """A name, the module that `python -m` starts, and what it does."""

    name: str
    module: str
    purpose: str


COMMANDS = [
    Command("run", "tessella.run", "all steps, from a folder of images to a model"),
    Command("data", "stage1_vqgan.data", "shows what a training would read, without training"),
    Command("train-tokenizer", "stage1_vqgan.train", "stage 1: trains a tokenizer, images to codes and back"),
    Command("train-features", "stage1_vqgan.train_features", "a feature network for metrics, on labelled images"),
    Command("evaluate-tokenizer", "stage1_vqgan.evaluate", "compares reconstructions with their images"),
    Command("tokenize", "stage2_prior.tokenize", "turns all images into codes"),
    Command("train-prior", "stage2_prior.train", "stage 2: trains a prior, which writes codes"),
    Command("build", "pipelines.build", "joins tokenizer and prior into a pipeline"),
    Command("generate", "pipelines.generate", "generates images"),
    Command("reconstruct", "pipelines.reconstruct", "images to codes and back"),
    Command("score", "pipelines.score", "how improbable images are: finds unusual ones"),
    Command("clip-guidance", "pipelines.clip_guidance", "an image that resembles a text or an image, by CLIP"),
    Command("evaluate", "pipelines.evaluate", "compares generated with real images"),
    Command("tune", "pipelines.tune", "chooses sampling settings by search, and saves them with the pipeline"),
    Command("convert", "stage1_vqgan.convert", "tokenizers of other projects to ours and back"),
    Command("convert-prior", "stage2_prior.convert", "priors of other projects to ours"),
    Command("push", "pipelines.push", "uploads a model to the Hugging Face Hub"),
    Command("presets", "configs.presets", "lists, prints and copies the settings that ship with the package"),
    Command("demo-app", "pipelines.app", "a web page that generates and reconstructs"),
]
BY_NAME = {command.name: command for command in COMMANDS}

USAGE = f"""usage: tessella COMMAND [arguments]

{"".join(f"  {command.name:<20}{command.purpose}" + chr(10) for command in COMMANDS)}
`tessella COMMAND --help` explains a command. `tessella --version` prints the version.
On several GPUs, start a training, tokenize or evaluate-tokenizer by `accelerate launch -m tessella COMMAND ...`.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts a command.

    Args:
        arguments: name and arguments of the command, by default those of the command line.
    """
    ctrl_c.install()
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in BY_NAME:
        start(BY_NAME[name], rest)
    elif name in ("--help", "-h", "help"):
        print(USAGE, end="")
    elif name == "--version":
        print(f"tessella {__version__}")
    else:
        refuse(name)


def start(command: Command, arguments: Sequence[str]) -> None:
    """Runs the module of a command as `python -m` would, with a usage that names the command."""
    for package in sorted({each.module.partition(".")[0] for each in COMMANDS}):
        import_own(package)
    command_line.started_as = f"tessella {command.name}"
    sys.argv = [command_line.started_as, *arguments]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def refuse(name: str) -> NoReturn:
    """Exits with the usage, or with the nearest names of commands."""
    if not name:
        print(USAGE, end="", file=sys.stderr)
        sys.exit(2)
    close = nearest(name, [word for command in COMMANDS for word in spellings(command)])
    names = [command.name for command in COMMANDS if close and close[0] in spellings(command)]
    advice = did_you_mean(names) or f"; commands: {', '.join(BY_NAME)}"
    print(f"tessella: there is no command {shown(name)}{advice}", file=sys.stderr)
    sys.exit(2)


def spellings(command: Command) -> list[str]:
    """Words by which a user may ask for a command."""
    return [command.name, command.module, *command.name.split("-")]
