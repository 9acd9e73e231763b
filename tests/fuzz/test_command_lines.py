"""Argument lists of every command: each is refused in our words, or gives a configuration that can be saved."""

import math
import os
import random
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints
from unittest import mock

from transformers import LlamaConfig, TrainingArguments

from configs import ConfigError, load_config, parse_arguments, save_config, to_dict
from configs.loader import key_of, switches
from configs.problems import SHOWN_PROBLEMS
from pipelines.build import BuildConfig
from pipelines.clip_guidance import CLIPGuidanceConfig
from pipelines.evaluation.config import EvaluationConfig
from pipelines.generate import GenerateConfig
from pipelines.reconstruct import ReconstructConfig
from pipelines.score import ScoreConfig
from stage1_vqgan import Stage1Config
from stage1_vqgan.configuration_architecture import VQGANArchitecture
from stage1_vqgan.convert.config import ConvertConfig
from stage1_vqgan.evaluate import ReconstructionConfig
from stage1_vqgan.quantizers import QUANTIZERS
from stage2_prior import Stage2Config
from stage2_prior.convert.config import ConvertConfig as PriorConvertConfig
from stage2_prior.training.arguments import training_arguments
from tessella.config import RunConfig
from tests.fuzz.harness import cases, generator, outcome
from tests.fuzz.test_yaml import BOMB

TOKEN = "hf_" + "aB3dE5gH7j" * 4
COMMANDS: dict[str, tuple[type, list[str]]] = {
    "stage1_vqgan.train": (Stage1Config, ["digits/stage1"]),
    "stage1_vqgan.evaluate": (ReconstructionConfig, ["--model=x", "--data.dataset=digits"]),
    "stage1_vqgan.convert": (ConvertConfig, ["--from=taming", "--checkpoint=x", "--output=y"]),
    "stage2_prior.convert": (PriorConvertConfig, ["--from=taming", "--checkpoint=x", "--output_dir=y"]),
    "stage2_prior.tokenize": (Stage2Config, ["digits/stage2"]),
    "stage2_prior.train": (Stage2Config, ["digits/stage2", "--report_to=[]"]),
    "pipelines.build": (BuildConfig, ["--tokenizer=x", "--prior=y", "--output_dir=z"]),
    "pipelines.clip_guidance": (CLIPGuidanceConfig, ["runs/x", "--clip=y", "--text=a", "--output=z.png"]),
    "pipelines.evaluate": (EvaluationConfig, ["digits/evaluate"]),
    "pipelines.generate": (GenerateConfig, ["runs/x", "--grid=y.png"]),
    "pipelines.reconstruct": (ReconstructConfig, ["runs/x", "--images=y"]),
    "pipelines.score": (ScoreConfig, ["runs/x", "--images=y"]),
    "tessella.run": (RunConfig, ["--data=digits", "--output_dir=x"]),
}


def keys_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration, also of the sections whose keys are those of other classes."""
    for each in fields(kind):
        key, hint = f"{prefix}{key_of(each)}", get_type_hints(kind)[each.name]
        yield key
        if is_dataclass(hint):
            yield from keys_of(hint, f"{key}.")
        elif key == "model" and hint == dict[str, Any]:
            yield from (
                f"model.{name.name}" for name in fields(VQGANArchitecture if kind is Stage1Config else LlamaConfig)
            )
            options = {name.name for quantizer in QUANTIZERS.values() for name in fields(quantizer.Options)}
            yield from (f"model.quantizer_options.{name}" for name in sorted(options))
        elif key == "training_arguments":
            yield from (f"training_arguments.{name.name}" for name in fields(TrainingArguments))


def words(text: str) -> list[str]:
    """The words between spaces; ~ stands for a space in a word."""
    return [word.replace("~", " ") for word in text.split()]


KEYS = {kind: list(keys_of(kind)) for kind, _ in COMMANDS.values()}
PLAIN = words("0 1 2 16 64 0.5 true false null x {} []")
NUMBERS = words("0 1 -1 2 3 7 2147483648 1e400 -1e30 1e-3 .nan -.inf -0 010 1_000 0x10 1:30 2.0 ٣ 1e5 4096")
NUMBERS += ["9" * 19, "9" * 40, "9" * 5000, "1" + "0" * 400]
WORDS = ["", "~", *words("true false null yes no x digits vq fsq ema lfq gumbel cosine none")]
LISTS = words("[] {} [1] [true] [true,2] [[1]] [a,b] [1,2.5] [null] [1e400] &a~[*a] [1,a {a {a:~1} {1:~2} {a:~{b:~[]}}")
LISTS += [BOMB, "{levels: [8, true]}", "{rotate: true}", "{x: &a [1], y: *a}", "[" * 900, "[" * 15]
PATHS = words(". / .. * & % ` /nonexistent/x ./é/日本 $HOME file:///etc/passwd /dev/zero /proc/self/mem")
PATHS += [
    "~",
    "a\0b",
    "x" * 5000,
    "a/" * 3000,
    "\udcff\udcfe",
    "a\nb",
    "\x1b[31mred",
    "\u202eabc",
    " ",
    "\t",
    "!!int ''",
    "a: b: c",
]
SECRETS = [TOKEN, f"[{TOKEN}]", f"{{a: {TOKEN}}}", f"https://me:{TOKEN}@host/x", f"{{hub_token: {TOKEN}", f'"{TOKEN}']


def value(draw: random.Random) -> str:
    return draw.choice(draw.choice([PLAIN, PLAIN, NUMBERS, WORDS, LISTS, PATHS, SECRETS]))


def mistyped(key: str, draw: random.Random) -> str:
    """A key with a mistake: a letter missing, twice, exchanged, in capitals, a part too many, or something else."""
    place = draw.randrange(len(key))
    return draw.choice(
        [
            key[:place] + key[place + 1 :],
            key[: place + 1] + key[place:],
            key[:place] + draw.choice("abc._-=é\0\n\x1b ") + key[place + 1 :],
            key.upper(),
            f"{key}.{draw.choice(['x', '', 'a.b.c', '.'])}",
            f".{key}",
            f"{key}.hub_token",
            f"training_arguments.{draw.choice(['hub_token', 'push_to_hub_token', 'my_password'])}",
            "a." * draw.choice([2, 30, 2000]) + "b",
            key * draw.choice([2, 500]),
        ]
    )


def command_line(number: int) -> tuple[type, list[str]]:
    """The configuration class of a command, and an argument list for it."""
    draw = generator("command lines", number)
    kind, arguments = COMMANDS[draw.choice(list(COMMANDS))]
    arguments = list(arguments)
    if draw.random() < 0.1:
        arguments[0] = draw.choice(
            [*PATHS, *SECRETS, "digits/stage1", "digits/stage2", "digit/stage1", "cifar10/stage1.yaml", "--"]
        )
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        key = draw.choice(KEYS[kind])
        key = mistyped(key, draw) if draw.random() < 0.1 else key
        form = draw.choices(["=", " ", "none", "stray", "dash"], [10, 10, 1, 1, 1])[0]
        if form == "=":
            arguments.append(f"--{key}={value(draw)}")
        elif form == " ":
            arguments += [f"--{key}", value(draw)]
        else:
            arguments.append({"none": f"--{key}", "stray": value(draw), "dash": f"-{key}=3"}[form])
    return kind, arguments


def parsed(kind: type, arguments: list[str]) -> tuple:
    return parse_arguments(arguments, kind.positional, switches(kind))


def checked(kind: type, arguments: list[str]) -> Any:
    """What a command does before its work: a configuration, and for stage 2 the arguments of Trainer."""
    config = load_config(kind, *parsed(kind, arguments))
    if isinstance(config, Stage2Config):
        training_arguments(config)
    return config


def same(given: Any, got: Any) -> bool:
    """Whether a setting has the value that was given: a boolean is no number, and a number is not rounded."""
    if isinstance(given, dict) and isinstance(got, dict):
        return all(same(given[key], got[key]) for key in given)
    if isinstance(given, list) and isinstance(got, list):
        return len(given) == len(got) and all(map(same, given, got))
    if isinstance(got, bool):
        return given in (0, 1) or isinstance(given, bool | str)
    if isinstance(given, bool):
        return False
    return given == got or str(given) == got or (isinstance(given, str) and float(given) == got)


@cases(short=200, long=3000)
def test_an_argument_list_is_refused_or_gives_what_was_written(numbers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked(Stage2Config, ["digits/stage2"])  # imports what takes seconds
    for number in numbers:
        kind, arguments = command_line(number)
        with mock.patch.dict(os.environ):  # TrainingArguments sets variables
            found = outcome(lambda: checked(kind, arguments), (ConfigError,), tmp_path)  # noqa: B023
        if isinstance(found, ConfigError):
            lines = str(found).split("\n")
            assert TOKEN not in str(found) and TOKEN[:10] not in str(found), arguments
            assert all(len(line) < 500 and line.isprintable() for line in lines), arguments
            assert len(lines) == 1 + min(len(found.problems), SHOWN_PROBLEMS + 1), arguments
            continue
        save_config(found, tmp_path / "config.yaml")
        assert load_config(kind, str(tmp_path / "config.yaml")) == found, arguments
        assert TOKEN not in (tmp_path / "config.yaml").read_text()
        for key, given in parsed(kind, arguments)[1].items():
            got = to_dict(found)
            for part in key.split("."):
                got = got.get(part) if isinstance(got, dict) else got
            if key == "warmup_ratio" and given is not None:
                given, got = given or 0, found.warmup_steps
            if re.search("_steps$|_step$|warmup_ratio", key) and type(given) is float and 0 < given < 1:
                given = math.ceil(given * found.max_steps)  # a share of the run
            assert same(given, got), (arguments, key, given, got)
