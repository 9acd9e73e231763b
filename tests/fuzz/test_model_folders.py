"""Damaged, edited, exchanged and malicious model folders: refused in our words, or the same numbers as before.

Every case changes a copy of a tokenizer, a prior, an adapter or a pipeline, with or without its checksums.json. With
checksums, nothing that changes a number is accepted. Without them, the fingerprint still protects the codes of the
tokenizer; a wrong number can come from the files in UNPROTECTED alone.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.checksums import CHECKSUMS_NAME, write_checksums
from pipelines import VQGANPipeline
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel, load_tokenizer
from stage2_prior import TokenLayout, load_prior
from stage2_prior.adapters import attach_adapter
from stage2_prior.prior import build_prior
from stage2_prior.training.config import LoraConfig
from tests import tiny
from tests.fuzz.harness import cases, damaged, generator, outcome, planted_pickle

REFUSALS = (ValueError, OSError)

# Without checksums: the numbers that can be wrong if a file is damaged.
UNPROTECTED = {
    "vqgan": {"model.safetensors": {"images"}},  # weights of the decoder
    "prior": {"model.safetensors": {"logits"}, "config.json": {"logits"}},
    "adapter": {key: {"logits"} for key in ["adapter_model.safetensors", "adapter_config.json", "token_layout.json"]},
    "pipeline": {
        "vqgan/model.safetensors": {"images"},
        "prior/model.safetensors": {"codes", "images"},
        "prior/config.json": {"codes", "images"},
        "model_index.json": {"names"},
    },
}

# Contents that a stranger adds to a folder.
KERNEL = {"attn_implementation": "someone/kernel"}
FIELDS: list[dict[str, Any]] = [
    KERNEL,
    {"_attn_implementation_internal": "someone/kernel"},
    {"text_config": KERNEL},
    {"auto_map": {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.PlantedModel"}},
    {"auto_map": {"AutoConfig": "someone/repository--planted.Planted"}},
    {"quantization_config": {"quant_method": "bitsandbytes"}},
    {"transformers_weights": "../other/model.safetensors"},
    {"configuration_files": ["config.4.0.0.json"]},
    {"custom_generate": "someone/repository"},
    {"dtype": "int8"},
    {"num_hidden_layers": 10**6},
    {"vocab_size": 10**12},
    {"num_embeddings": 2**40},
    {"channel_multiplier": [1] * 10**6},
    {"target_modules": "((.*)*)*!"},
    {"r": 10**9},
    {"megatron_core": "antigravity"},
    {"base_model_name_or_path": "someone/repository"},
]
FILES = [
    "pytorch_model.bin",
    "adapter_model.bin",
    "training_args.bin",
    "model.pt",
    "optimizer.pt",
    "consolidated.pth",
    "model.safetensors",
    "adapter_model.safetensors",
    "shard-00001-model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
]


# Files that torch, accelerate, transformers, Lightning or peft would unpickle.
PICKLES = [
    "pytorch_model.bin",
    "adapter_model.bin",
    "training_args.bin",
    "trainer_state.pkl",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "last.ckpt",
    "model.pt",
    "consolidated.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    ".metadata",
    "__0_0.distcp",
]


@dataclass(frozen=True)
class Kind:
    """A kind of folder: how to load it, and numbers of what was loaded, by name."""

    load: Callable[[Path], Any]
    numbers: Callable[[Any], dict[str, Any]]


def logits(prior: Any) -> dict[str, Any]:
    vocabulary = prior.config.vocab_size
    return {"logits": prior(input_ids=torch.tensor([[32, 3, 1, 4]]) % vocabulary).logits}


def images(model: Any) -> dict[str, Any]:
    pixels = torch.rand(2, model.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.encode(pixels).codes
    return {"codes": codes, "images": model.decode_codes(codes)}


def samples(pipeline: Any) -> dict[str, Any]:
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline.generate([0, 1], temperature=0.0, output_type="pt")
    encoded = images(pipeline.vqgan)["codes"]
    return {"codes": found.codes, "images": found.images, "encoded": encoded, "names": pipeline.class_names}


KINDS = {
    "vqgan": Kind(lambda folder: load_tokenizer(str(folder)), images),
    "prior": Kind(lambda folder: load_prior(str(folder)), logits),
    "adapter": Kind(lambda folder: load_prior(str(folder)), logits),
    "pipeline": Kind(VQGANPipeline.from_pretrained, samples),
}


def write_folders(root: Path, seed: int) -> None:
    """A tokenizer, a prior, an adapter and their pipeline, with random weights and checksums."""
    torch.manual_seed(seed)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN)).eval()
    processor = VQGANImageProcessor(16, 1)
    layout = TokenLayout(32, ("ant", "bee"), (4, 4), 4, vqgan.compute_fingerprint())
    prior = build_prior(tiny.RANDOM_PRIORS["llama"], layout).eval()
    VQGANPipeline(vqgan, prior, processor, layout).save_pretrained(root / "pipeline")
    for part in (vqgan, processor):
        part.save_pretrained(root / "vqgan")
    prior.save_pretrained(root / "prior")
    adapted = attach_adapter(prior, str(root / "prior"), LoraConfig(r=2), [])
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.2)
    adapted.save_pretrained(root / "adapter")
    for name in ("prior", "adapter"):
        layout.save_pretrained(root / name)
    for name in ("vqgan", "prior", "adapter", "pipeline/vqgan", "pipeline/prior", "pipeline"):
        write_checksums(root / name)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two runs, `mine` and `other`."""
    root = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate(("mine", "other")):
        write_folders(root / name, seed)
    return root


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(originals: Path) -> dict[str, dict[str, Any]]:
    """The numbers of the undamaged folders."""
    return {name: kind.numbers(kind.load(originals / "mine" / name)) for name, kind in KINDS.items()}


# ---------------------------------------------------------------------- damage


def pick(folder: Path, draw: random.Random, pattern: str = "*") -> Path:
    """One of the files of a folder, but not its checksums."""
    found = [path for path in sorted(folder.rglob(pattern)) if path.is_file() and path.name != CHECKSUMS_NAME]
    return draw.choice(found)


def damage_bytes(folder: Path, other: Path, draw: random.Random) -> Path:
    path = pick(folder, draw, draw.choice(["*.json", "*.safetensors"]))
    path.write_bytes(damaged(path.read_bytes(), draw))
    return path


def edit_json(folder: Path, other: Path, draw: random.Random) -> Path:
    path = pick(folder, draw, "*.json")
    values = json.loads(path.read_text())
    node: Any = values
    while True:  # walks to a random place
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or draw.random() < 0.3:
            break
        node = node[key]
    if draw.random() < 0.1 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = draw.choice(edits(node[key]))
    path.write_text(json.dumps(values))
    return path


def edits(value: Any) -> list[Any]:
    """Other values of the same type and of other types."""
    strange = [None, "", "x", 0, -1, 1.5, True, [], {}, [[]], 10**12, math.nan, "../../x", "someone/kernel"]
    if isinstance(value, bool):
        return [not value, *strange]
    if isinstance(value, int | float):
        return [value + 1, value * 2, value // 2, -value, 2**31, 10**6, float(value), str(value), *strange]
    if isinstance(value, str):
        return [value + "x", value[:-1], value.upper(), [value], {value: value}, value * 1000, *strange]
    if isinstance(value, list):
        return [value + value, value[:-1], value[::-1], value * 100_000, dict.fromkeys(map(str, value)), *strange]
    return [{**(value or {}), "more": 1}, [value], *strange]


def add_fields(folder: Path, other: Path, draw: random.Random) -> Path:
    path = pick(folder, draw, draw.choice(["*config.json", "*.json"]))
    path.write_text(json.dumps({**json.loads(path.read_text()), **draw.choice(FIELDS)}))
    return path


def remove_file(folder: Path, other: Path, draw: random.Random) -> Path:
    path = pick(folder, draw)
    path.unlink()
    return path


def add_file(folder: Path, other: Path, draw: random.Random) -> Path:
    """A pickle, or a file of the other run, under a name that a library may look for."""
    path = pick(folder, draw, "*config.json").parent / draw.choice(FILES)
    if draw.random() < 0.5:
        path.write_bytes(planted_pickle(folder / "canary"))
    elif not path.exists():
        shutil.copy(pick(other, draw, "*.safetensors" if path.suffix != ".json" else "*.json"), path)
    return path


def exchange_file(folder: Path, other: Path, draw: random.Random) -> Path:
    path = pick(folder, draw, draw.choice(["*.json", "*.safetensors"]))
    shutil.copy(other / path.relative_to(folder), path)
    return path


def exchange_part(folder: Path, other: Path, draw: random.Random) -> Path:
    """A part of another pipeline, complete with its checksums; for other folders one file."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    if not parts:
        return exchange_file(folder, other, draw)
    part = draw.choice(parts)
    shutil.copytree(other / part.name, part, dirs_exist_ok=True)
    return part / "model.safetensors"


def change_tensor(folder: Path, other: Path, draw: random.Random) -> Path:
    path = pick(folder, draw, "*.safetensors")
    weights: dict[str, Tensor] = load_file(path)
    name = draw.choice(sorted(weights))
    value = weights[name].clone()
    kind = draw.choice(["nan", "inf", "rename", "turn", "drop", "dtype", "flat", "double", "swap", "tiny"])
    if kind in ("nan", "inf"):
        value.view(-1)[draw.randrange(value.numel())] = float(kind)
    elif kind == "turn":
        value = value.flip(0) if value.ndim < 2 else value.transpose(0, 1).contiguous()
    elif kind == "dtype":
        value = value.to(draw.choice([torch.int32, torch.float16, torch.float64, torch.float8_e4m3fn, torch.bool]))
    elif kind == "flat":
        value = value.reshape(-1, 1)
    elif kind == "double":
        value = torch.cat([value, value])
    elif kind == "swap":
        second = draw.choice([key for key in sorted(weights) if weights[key].shape == value.shape])
        value, weights[second] = weights[second].clone(), value
    elif kind == "tiny":
        value.view(-1)[0] += 1e-6
    weights[name] = value
    if kind in ("rename", "drop"):
        del weights[name]
    if kind == "rename":
        weights[f"{name}x"] = value
    save_file(weights, path, {"format": "pt"})
    return path


DAMAGES = [
    damage_bytes,
    edit_json,
    add_fields,
    remove_file,
    add_file,
    exchange_file,
    exchange_part,
    change_tensor,
]


# ---------------------------------------------------------------------- the tests


@torch.no_grad()
@pytest.mark.parametrize("place", ["beside", "instead"])
def test_planted_pickles_run_nowhere(originals, expected, tmp_path, place):
    """Beside the weights they change nothing; without weights the folder is refused."""
    for name, kind in KINDS.items():
        folder = shutil.copytree(originals / "mine" / name, tmp_path / name)
        parts = [path for path in sorted(folder.iterdir()) if path.is_dir()]
        for part in (folder, *parts):
            for path in part.glob("*.safetensors") if place == "instead" else []:
                path.with_suffix(".bin").write_bytes(planted_pickle(tmp_path / "canary"))
                path.unlink()
            for file in PICKLES:
                (part / file).write_bytes(planted_pickle(tmp_path / "canary"))
            if place == "instead":
                (part / CHECKSUMS_NAME).unlink()
        found = outcome(lambda folder=folder, kind=kind: kind.numbers(kind.load(folder)), REFUSALS, tmp_path)
        assert not (tmp_path / "canary").exists(), name
        if place == "beside":
            assert not differing(found, expected[name])
        else:
            assert "other formats" in str(found)


@dataclass
class Case:
    """A changed copy of a folder."""

    kind: str
    damage: str
    sealed: bool
    folder: Path
    file: str


def make_case(number: int, originals: Path, folder: Path) -> Case:
    draw = generator("model folders", number)
    name, damage, sealed = draw.choice(sorted(KINDS)), DAMAGES[number % len(DAMAGES)], draw.random() < 0.4
    shutil.copytree(originals / "mine" / name, folder)
    file = damage(folder, originals / "other" / name, draw)
    if not sealed:
        for path in folder.rglob(CHECKSUMS_NAME):
            path.unlink()
    return Case(name, damage.__name__, sealed, folder, file.relative_to(folder).as_posix())


@torch.no_grad()
def numbers_of(case: Case) -> dict[str, Any]:
    """The numbers of a folder; ValueError or OSError if it is refused."""
    kind = KINDS[case.kind]
    return kind.numbers(kind.load(case.folder))


def differing(found: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    """The names of the numbers that differ."""
    return {name for name, value in expected.items() if not _same(found[name], value)}


def _same(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(two, Tensor) else one == two


@cases(short=32, long=400)
def test_a_changed_folder_is_refused_or_gives_the_same_numbers(numbers, originals, expected, tmp_path):
    for number in numbers:
        case = make_case(number, originals, tmp_path / f"{number}")
        found = outcome(partial(numbers_of, case), REFUSALS, tmp_path)
        assert not (case.folder / "canary").exists(), case
        if isinstance(found, Exception):
            assert len(str(found)) < 1500, (case, found)
            continue
        wrong = differing(found, expected[case.kind])
        assert wrong <= (set() if case.sealed else UNPROTECTED[case.kind].get(case.file, set())), (case, wrong)
        shutil.rmtree(case.folder)
