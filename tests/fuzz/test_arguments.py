"""Arguments of the Python API: one of them is replaced by something else.

Each argument states which plain value another value stands for, if any. A call must then give what the plain value
gives. Any other value must be refused with a text that begins with the name of the argument.
"""

import datetime
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError, check
from pipelines import VQGANPipeline
from pipelines.defaults import STANDARD
from pipelines.evaluation.config import EvaluationConfig
from stage1_vqgan import DataConfig, VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import SamplingOptions, TokenLayout, sample
from stage2_prior.prior import build_prior
from stage2_prior.sampling.decoder import EagerDecoder
from tests import tiny
from tests.fuzz.harness import cases, generator, outcome

REFUSED = object()  # what a value stands for that must be refused
Listed = list | tuple | np.ndarray
REFUSALS = (TypeError, ValueError, OSError)
NAMES = ("ant", "bee", "cat")
HUGE = 10**12


class Hostile:
    """Raises on most uses."""

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    def __bool__(self):
        raise RuntimeError("no truth")

    __hash__ = None


ANYTHING = {
    **{
        repr(value): lambda value=value: value for value in (None, True, False, 0, 1, -1, 2, 3, HUGE, 10**30, -(10**30))
    },
    **{repr(value): lambda value=value: value for value in (0.5, 1.0, 2.0, -0.5, math.nan, math.inf, 1e308)},
    **{
        repr(value): lambda value=value: value for value in ("", "1", "pil", "auto", "cuda", "\0", b"1", 1j, [], {}, ())
    },
    **{repr(value): lambda value=value: value for value in ([[]], (1,), [1, 2], [True], {1: 2}, {1}, [None], ..., int)},
    "many digits": lambda: 10**5000,
    "long text": lambda: "x" * 10**5,
    "object": object,
    "hostile object": Hostile,
    "function": lambda: lambda: 0,
    "iterator": lambda: iter([1]),
    "endless iterator": itertools.count,
    "endless range": lambda: range(10**30),
    "long range": lambda: range(HUGE),
    "date": lambda: datetime.date(2026, 1, 1),
    "fraction": lambda: Fraction(1, 2),
    "decimal": lambda: Decimal("0.5"),
    "path": lambda: Path("there/is/none"),
    "int64": lambda: np.int64(1),
    "uint8": lambda: np.uint8(2),
    "float32": lambda: np.float32(0.5),
    "float64 NaN": lambda: np.float64("nan"),
    "numpy bool": lambda: np.bool_(True),
    "empty array": lambda: np.array([]),
    "array of no axis": lambda: np.array(1),
    "array of floats": lambda: np.array([0.5, 1.0]),
    "array of objects": lambda: np.array([None, 1], dtype=object),
    "array of complex numbers": lambda: np.zeros((1, 2, 2), complex),
    "array of texts": lambda: np.array(["a"]),
    "structured array": lambda: np.zeros(2, dtype=[("a", int)]),
    "tensor of no axis": lambda: torch.tensor(1.0),
    "tensor of floats": lambda: torch.tensor([0.5]),
    "tensor of booleans": lambda: torch.ones(2, 4, 4, dtype=torch.bool),
    "empty tensor": lambda: torch.empty(0),
    "tensor of three axes": lambda: torch.full((2, 3, 5), 9.5),
    "meta tensor": lambda: torch.zeros(1, 4, 4, device="meta", dtype=torch.int64),
    "sparse tensor": lambda: torch.eye(4)[None].to_sparse(),
    "meta device": lambda: torch.device("meta"),
    "dtype of integers": lambda: torch.int64,
    "dtype of complex numbers": lambda: torch.complex64,
}


@dataclass
class Argument:
    """One argument.

    Attributes:
        plain: makes a value that works.
        means: the plain value that another value stands for, or REFUSED.
        near: values of this argument's kind to try, by name; each makes a value and what it stands for.
    """

    plain: Callable[[], Any]
    means: Callable[[Any], Any] = lambda value: REFUSED
    near: dict[str, tuple[Callable[[], Any], Any]] = field(default_factory=dict)


def is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool | np.bool_)


def whole(least: int, most: float) -> Callable[[Any], Any]:
    def means(value):
        return int(value) if is_number(value, (int, np.integer)) and least <= value <= most else REFUSED

    return means


def number(least: float, most: float, whole_only: bool = False) -> Callable[[Any], Any]:
    def means(value):
        if not is_number(value, (int, float, np.integer, np.floating, Fraction)) or not least <= value <= most:
            return REFUSED
        return REFUSED if whole_only and value != int(value) else float(value)

    return means


def group_scales(value):
    """Guidance scales: one for all conditions, or one for each group of them."""
    scales = [number(0, 3.4e38)(one) for one in value] if type(value) in (list, tuple) else [number(0, 3.4e38)(value)]
    if not scales or any(scale is REFUSED for scale in scales):
        return REFUSED
    return tuple(scales) if type(value) in (list, tuple) else scales[0]


def scales_of_prompts(value):
    """Guidance scales of two prompts: one for both, or a list with one for each."""
    scales = group_scales(value)
    if not isinstance(scales, tuple):
        return scales
    return list(scales) if len(scales) == 2 else REFUSED


def size_of(value):
    """The height and width that a size of the image processor stands for; None is that of its default."""
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        value = [value["height"], value["width"]]
    sides = list(value) if type(value) in (list, tuple) else [256 if value is None else value] * 2
    return sides if len(sides) == 2 and all(type(side) is int and 1 <= side <= 65536 for side in sides) else REFUSED


def either(*allowed: Any) -> Callable[[Any], Any]:
    return lambda value: value if any(type(value) is type(one) and value == one for one in allowed) else REFUSED


def optional(means: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else means(value)


def labels(value: Any) -> Any:
    """Class labels: ids or names, one or a list."""
    if isinstance(value, torch.Tensor | np.ndarray):
        if value.ndim > 1 or getattr(value, "is_meta", False):
            return REFUSED
        value = value.tolist()
    listed = list(value) if isinstance(value, list | tuple) else [value]
    good = [
        (is_number(one, (int, np.integer)) and 0 <= one < len(NAMES)) or one in NAMES for one in listed if one is one
    ]
    return [int(one) for one in listed] if listed and len(good) == len(listed) and all(good) else REFUSED


def names(value: Any) -> Any:
    """Names of classes."""
    return () if value in ([], ()) else REFUSED


def path(value: Any) -> Any:
    """A path, or another value, whose text is not too long and has no NUL."""
    return value if len(str(value)) < 4096 and "\0" not in str(value) else REFUSED


def constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def pixels(dtype: torch.dtype = torch.float32, channels: int = 1, scale: float = 1.0) -> torch.Tensor:
    return ((torch.arange(512.0).view(2, 1, 16, 16) / 256 - 1).expand(2, channels, 16, 16) * scale).to(dtype)


def codes(dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return (torch.arange(32).view(2, 4, 4) % 32).to(dtype)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@cache
def pipeline() -> VQGANPipeline:
    """A pipeline with random weights."""
    torch.manual_seed(0)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN))
    layout = TokenLayout(32, NAMES, (4, 4), 4, vqgan.compute_fingerprint())
    pipe = VQGANPipeline(vqgan, build_prior(tiny.RANDOM_PRIORS["llama"], layout), VQGANImageProcessor(16, 1), layout)
    pipe.set_progress_bar_config(disable=True)
    return pipe


WRONG_CODES = {
    "float codes": (lambda: codes(torch.float32), REFUSED),
    "double codes as an array": (lambda: codes(torch.float64).numpy(), REFUSED),
    "bfloat16 codes": (lambda: codes(torch.bfloat16), REFUSED),
    "complex codes": (lambda: codes(torch.complex64), REFUSED),
    "boolean codes": (lambda: codes(torch.bool), REFUSED),
    "codes as texts": (lambda: codes().numpy().astype(str), REFUSED),
    "codes as objects": (lambda: codes().numpy().astype(object), REFUSED),
    "overflowing codes": (lambda: np.full((1, 4, 4), 2**64 - 1, np.uint64), REFUSED),
    "an overflowing tensor": (lambda: torch.from_numpy(np.full((1, 4, 4), 2**64 - 1, np.uint64)), REFUSED),
    "codes beyond the codebook": (lambda: codes() + 1, REFUSED),
    "negative codes": (lambda: codes() - 1, REFUSED),
    "no images": (lambda: codes()[:0], REFUSED),
    "no rows": (lambda: codes()[:, :0], REFUSED),
    "two axes": (lambda: codes()[0], REFUSED),
    "four axes": (lambda: codes()[None], REFUSED),
    "expanded codes": (lambda: codes()[:1, :1, :1].expand(1, 10**5, 10**6), REFUSED),
}
INTEGER_CODES = {
    "int32 codes": (lambda: codes(torch.int32), codes()),
    "uint64 codes": (lambda: codes(torch.uint64), codes()),
    "an array": (lambda: codes().numpy(), codes()),
    "nested lists": (lambda: codes().tolist(), codes()),
    "ragged lists": (lambda: [[[1, 2], [3]]], REFUSED),
    "lists of booleans": (lambda: [[[True, False]]], REFUSED),
    "a reversed array": (lambda: codes().numpy()[::-1], codes().flip(0)),
    "a big-endian array": (lambda: codes().numpy().astype(">i8"), codes()),
}
BYTES = (pixels().add(1).mul(127.5)).round().to(torch.uint8)
CLASS_PRIORS = {
    "weights": (lambda: np.full(3, 7), "uniform"),
    "a tensor of weights": (lambda: torch.ones(3), "uniform"),
    "negative weights": (lambda: [1, 1, -1], REFUSED),
    "two axes of weights": (lambda: np.ones((3, 1)), REFUSED),
    "ragged weights": (lambda: [1, [1], 1], REFUSED),
    "texts": (lambda: ["1", "1", "1"], REFUSED),
    "a dictionary of weights": (lambda: {"ant": 1}, REFUSED),
}
IMAGES = {
    "a tensor": (lambda: BYTES, BYTES),
    "floats": (lambda: BYTES / 255, BYTES),
    "an array": (lambda: BYTES.permute(0, 2, 3, 1).numpy(), BYTES),
    "PIL images": (lambda: [Image.fromarray(one[0].numpy()) for one in BYTES], BYTES),
    "RGB": (lambda: [Image.fromarray(one[0].numpy()).convert("RGB") for one in BYTES], BYTES),
    "palette": (lambda: [Image.fromarray(one[0].numpy()).convert("P") for one in BYTES], BYTES),
    "mixed kinds": (lambda: [BYTES[0], BYTES[1, 0].numpy()], BYTES),
    "ragged": (lambda: [np.full((16, 16), 7, np.uint8), np.full((20, 30), 7, np.uint8)], torch.full_like(BYTES, 7)),
    "NaN": (lambda: BYTES / math.nan, REFUSED),
    "above 1": (lambda: BYTES / 100, REFUSED),
    "negative": (lambda: pixels(), REFUSED),
    "two channels": (lambda: BYTES.expand(2, 2, 16, 16), REFUSED),
    "int64": (lambda: BYTES.long(), REFUSED),
    "complex": (lambda: BYTES.to(torch.complex64), REFUSED),
    "booleans": (lambda: BYTES > 9, (BYTES > 9).byte() * 255),
    "no pixels": (lambda: BYTES[..., :0], REFUSED),
    "no images": (lambda: BYTES[:0], REFUSED),
    "nested lists": (lambda: [[BYTES[0]]], REFUSED),
    "a path": (lambda: ["image.png"], REFUSED),
    "a PIL image of no pixels": (lambda: Image.new("RGB", (0, 4)), REFUSED),
    "a PIL image with NaN": (lambda: Image.fromarray(np.full((4, 4), np.nan, np.float32)), REFUSED),
    "meta": (lambda: BYTES.to("meta"), REFUSED),
}
PIXELS = {
    "integers": (lambda: pixels(torch.int64), REFUSED),
    "bytes": (lambda: BYTES, REFUSED),
    "double": (lambda: pixels(torch.float64), REFUSED),
    "half": (lambda: pixels(torch.float16), REFUSED),
    "complex": (lambda: pixels(torch.complex64), REFUSED),
    "booleans": (lambda: pixels() > 0, REFUSED),
    "three channels": (lambda: pixels(channels=3), REFUSED),
    "no rows": (lambda: pixels()[:, :, :0], REFUSED),
    "an odd size": (lambda: pixels()[..., :15], REFUSED),
    "one image": (lambda: pixels()[0], REFUSED),
    "an array": (lambda: pixels().numpy(), REFUSED),
    "meta": (lambda: pixels().to("meta"), REFUSED),
    "sparse": (lambda: pixels().to_sparse(), REFUSED),
}
SCALE_LISTS = {
    "a tuple": (lambda: (0, 2.5), [0.0, 2.5]),
    "of one prompt": (lambda: [2.0], REFUSED),
    "of three prompts": (lambda: [2.0, 3.0, 4.0], REFUSED),
    "nested": (lambda: [[2.0], [3.0]], REFUSED),
    "one is wrong": (lambda: [2.0, math.nan], REFUSED),
    "an unknown name": (lambda: {"style": [2.0, 3.0]}, REFUSED),
}
SAMPLING = {
    "guidance_scale": Argument(constant(1.5), scales_of_prompts, near=SCALE_LISTS),
    "guidance_schedule": Argument(constant("linear"), either("constant", "linear", "cosine")),
    "guidance_power": Argument(constant(1.0), number(1e-300, 1.7e308)),
    "guidance_interval": Argument(
        constant((0.0, 1.0)),
        lambda value: tuple(value) if np.array_equal(value, [0.5, 1.0]) else REFUSED,
        near={
            "list": (lambda: [0, 1], (0.0, 1.0)),
            "array": (lambda: np.array([0.0, 0.5]), (0.0, 0.5)),
            "texts": (lambda: "01", REFUSED),
            "texts in a list": (lambda: ["0", "1"], REFUSED),
            "NaN": (lambda: (0.0, math.nan), REFUSED),
            "booleans": (lambda: (False, True), REFUSED),
            "reversed": (lambda: (1.0, 0.0), REFUSED),
            "empty": (lambda: (0.5, 0.5), REFUSED),
        },
    ),
    "temperature": Argument(constant(1.0), lambda value: number(0, 3.4e38)(value)),
    "top_k": Argument(constant(0), number(0, 1.7e308, whole_only=True)),
    "top_p": Argument(constant(1.0), number(1.2e-38, 1)),
    "min_p": Argument(constant(0.0), number(0, 1)),
}
# Arguments of the pipeline: None stands for its default, which is the standard value here.
OF_PIPELINE = {
    name: replace(one, means=lambda value, name=name, one=one: STANDARD[name] if value is None else one.means(value))
    for name, one in SAMPLING.items()
}
GENERATORS = {
    "list": (lambda: [seeded()], REFUSED),
    "nested list": (lambda: [[seeded()], [seeded()]], REFUSED),
    "list with None": (lambda: [seeded(), None], REFUSED),
    "a seed": (lambda: 7, REFUSED),
}
CALLBACKS = {
    "one argument": (lambda: lambda position: None, REFUSED),
    "no argument": (lambda: dict, REFUSED),
    "two arguments": (lambda: lambda position, chosen: None, None),
    "any arguments": (lambda: lambda *chosen: None, None),
    "text": (lambda: "print", REFUSED),
}
SCORES_OF_IMAGES = {
    "zeros": (lambda: lambda images, labels: np.zeros(len(images)), lambda *given: torch.zeros(len(given[0]))),
    "nothing": (lambda: lambda images, labels: None, REFUSED),
    "one number": (lambda: lambda images, labels: 0.0, REFUSED),
    "too few": (lambda: lambda images, labels: [0.0] * (len(images) - 1), REFUSED),
    "NaN": (lambda: lambda images, labels: [math.nan] * len(images), REFUSED),
    "texts": (lambda: lambda images, labels: ["1"] * len(images), REFUSED),
    "ragged": (lambda: lambda images, labels: [[1], [1, 2], 3, 4], REFUSED),
    "hostile": (lambda: lambda images, labels: Hostile(), REFUSED),
}
OUTPUT = {
    "seed": Argument(constant(None), either(None), near={"beside the generator": (lambda: 7, REFUSED)}),
    "generator": Argument(seeded, either(None), near=GENERATORS),
    "batch_size": Argument(constant(None), optional(whole(1, 1e999))),
    "callback_on_step_end": Argument(constant(None), either(None), near=CALLBACKS),
}
LABELLED = {
    **OF_PIPELINE,
    **OUTPUT,
    "class_labels": Argument(
        constant([1, 2]),
        labels,
        near={
            "names": (lambda: ["bee", 2], [1, 2]),
            "numpy": (lambda: np.array([1, 2], np.uint8), [1, 2]),
            "tensor": (lambda: torch.tensor([1, 2]), [1, 2]),
            "booleans": (lambda: [True, False], REFUSED),
            "floats": (lambda: torch.tensor([1.0, 2.0]), REFUSED),
            "nested": (lambda: [[1, 2]], REFUSED),
            "two axes": (lambda: torch.tensor([[1, 2]]), REFUSED),
            "set": (lambda: {1, 2}, REFUSED),
            "bytes": (lambda: b"\1\2", REFUSED),
        },
    ),
    **{name: Argument(constant(None), either(None)) for name in ("num_steps", "order", "order_temperature")},  # causal
    "num_images": Argument(constant(None), either(None)),
    "num_images_per_label": Argument(constant(1), whole(1, 100)),
    "output_type": Argument(constant("np"), either("pil", "np", "pt", "codes")),
    "image_size": Argument(
        constant(16),
        optional(lambda value: REFUSED),
        near={
            "a pair": (lambda: (16, 20), [16, 20]),
            "int64": (lambda: np.int64(20), 20),
            "smaller": (lambda: 12, REFUSED),
            "half a code": (lambda: 18, REFUSED),
            "three": (lambda: (16, 16, 16), REFUSED),
            "floats": (lambda: [16.0, 20.0], REFUSED),
            "booleans": (lambda: [16, True], REFUSED),
        },
    ),
}
MASK = BYTES[0, 0] > 90
MASKS = {
    "an array": (MASK.numpy, MASK),
    "one for each": (lambda: [MASK, MASK.numpy()], MASK),
    "a stack": (lambda: torch.stack([MASK, MASK]), MASK),
    "a PIL image": (lambda: Image.fromarray(MASK.numpy()), MASK),
    "gray": (lambda: Image.fromarray(MASK.numpy() * np.uint8(200)), MASK),
    "palette": (lambda: Image.fromarray(MASK.numpy()).convert("P"), MASK),
    "transparent": (lambda: Image.fromarray(MASK.numpy()).convert("RGBA"), REFUSED),
    "bytes": (MASK.byte, REFUSED),
    "floats": (MASK.float, REFUSED),
    "another size": (lambda: MASK[:8], REFUSED),
    "channels": (lambda: MASK[None].expand(2, 1, 16, 16), REFUSED),
    "too few": (lambda: [MASK], REFUSED),
    "meta": (lambda: MASK.to("meta"), REFUSED),
    "sparse": (MASK.to_sparse, REFUSED),
}
EDITED = {
    **OF_PIPELINE,
    **{
        name: argument
        for name, argument in LABELLED.items()
        if name in OUTPUT or name in ("class_labels", "output_type")
    },
    "images": Argument(lambda: BYTES, near={name: IMAGES[name] for name in IMAGES if name != "ragged"}),
    "seam": Argument(constant(2), optional(whole(0, 1024))),
}
SIDE = Argument(constant(4), lambda value: 0 if is_number(value, (int,)) and value == 0 else REFUSED)


def read_as_whole(value: Any) -> Any:
    """A configuration reads 2.0, "2" and b"2" as 2, because a command line holds texts."""
    value = value.item() if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0 else value
    plain = isinstance(value, str | bytes) or is_number(value, (int, float, np.integer, np.floating, Decimal, Fraction))
    return whole(1, 2**31 - 1)(int(value)) if plain and float(value) == int(value) else REFUSED


def evaluation_config(**values: Any) -> Any:
    return check(EvaluationConfig(pipeline="a", output_dir="b", data=DataConfig(dataset="digits"), **values))


def sampled(**values: Any) -> torch.Tensor:
    return sample(EagerDecoder(pipeline().prior, 4, 16), **values)


def prompts(value: int, dtype: torch.dtype = torch.int64) -> Callable[[], torch.Tensor]:
    return lambda: torch.full((2, 1), value, dtype=dtype)


TOKENS = {
    "floats": (prompts(33, torch.float32), REFUSED),
    "int32": (prompts(33, torch.int32), REFUSED),
    "one axis": (lambda: torch.tensor([33, 33]), REFUSED),
    "no rows": (lambda: torch.zeros(0, 1, dtype=torch.int64), REFUSED),
    "no tokens": (lambda: torch.zeros(2, 0, dtype=torch.int64), REFUSED),
}


@cache
def apis() -> dict[str, tuple[Callable[..., Any], dict[str, Argument]]]:
    """The calls, by name, with their arguments."""
    pipe, processor = pipeline(), VQGANImageProcessor(16, 1)
    either_type = either("pil", "np", "pt")
    return {
        "generate with labels": (pipe.generate, LABELLED),
        "generate": (
            pipe.generate,
            {
                **OUTPUT,
                "num_images": Argument(constant(2), optional(whole(1, 100))),
                "output_type": Argument(constant("pt"), either("pil", "np", "pt", "codes")),
                "num_images_per_label": Argument(constant(1), whole(1, 1)),
                "best_by": Argument(constant(None), either(None), near={"class": (lambda: "class", REFUSED)}),
            },
        ),
        "generate the best": (
            pipe.generate,
            {
                **{name: LABELLED[name] for name in ("class_labels", "generator", "output_type")},
                "best_of": Argument(constant(2), whole(1, 1000)),
                "best_by": Argument(constant("class"), near=SCORES_OF_IMAGES),
            },
        ),
        "inpaint": (pipe.inpaint, {**EDITED, "masks": Argument(lambda: MASK, near=MASKS)}),
        "complete": (pipe.complete, {**EDITED, "rows": Argument(constant(8), whole(1, 15))}),
        "outpaint": (pipe.outpaint, {**EDITED, **dict.fromkeys(("left", "top", "right", "bottom"), SIDE)}),
        "vary": (
            pipe.vary,
            {
                **{name: argument for name, argument in EDITED.items() if name != "seam"},
                "strength": Argument(constant(0.5), number(1e-300, 1)),
            },
        ),
        "encode": (pipe.encode, {"images": Argument(lambda: BYTES, near=IMAGES)}),
        "decode": (
            pipe.decode,
            {
                "codes": Argument(codes, near=WRONG_CODES | INTEGER_CODES),
                "output_type": Argument(constant("np"), either_type),
            },
        ),
        "reconstruct": (
            pipe.reconstruct,
            {"images": Argument(lambda: BYTES, near=IMAGES), "output_type": Argument(constant("pt"), either_type)},
        ),
        "score": (
            lambda **values: pipe.score(**values).nats,
            {
                "images": Argument(lambda: BYTES, near=IMAGES),
                "class_labels": Argument(constant([1, 2]), optional(labels), near=LABELLED["class_labels"].near),
                "batch_size": Argument(constant(None), optional(whole(1, math.inf))),
            },
        ),
        "class_posterior": (
            pipe.class_posterior,
            {
                "images": Argument(lambda: BYTES, near=IMAGES),
                "class_prior": Argument(constant("uniform"), either("uniform"), near=CLASS_PRIORS),
            },
        ),
        "to": (
            lambda device: pipe.to(device).device.type,
            {
                "device": Argument(
                    constant("cpu"),
                    lambda value: (
                        "cpu" if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else REFUSED
                    ),
                    near={"device": (lambda: torch.device("cpu"), "cpu")},
                )
            },
        ),
        "to dtype": (
            lambda dtype: str(pipe.to(dtype=dtype).dtype),
            {"dtype": Argument(constant(torch.float32), optional(either(torch.float32)))},
        ),
        "from_pretrained": (
            lambda **values: VQGANPipeline.from_pretrained(**{"pretrained_model_name_or_path": "none", **values}),
            {
                name: Argument(constant(None), lambda value, of=kinds: path(value) if type(value) in of else REFUSED)
                for name, kinds in {
                    "revision": (str, type(None)),
                    "token": (str, bool, type(None)),
                    "cache_dir": (str, type(Path()), type(None)),
                    "local_files_only": (bool,),
                    "subfolder": (str,),
                    "trust_remote_code": (bool,),
                    "attn_implementation": (str, type(None)),
                    "device": (type(None),),
                }.items()
            }
            | {
                "device_map": Argument(constant(None), either(None, "auto")),
                "dtype": Argument(constant(None), either(None, "auto")),
                "pretrained_model_name_or_path": Argument(
                    constant("none"), lambda value: path(value) if isinstance(value, str | Path) else REFUSED
                ),
            },
        ),
        "push_to_hub": (
            pipe.push_to_hub,
            {
                "repo_id": Argument(
                    constant("user/name"),
                    either("1", "pil", "auto", "cuda"),
                    near={"three": (lambda: "a/b/c", REFUSED)},
                ),
                "private": Argument(constant(None), optional(either(True, False))),
                "commit_message": Argument(constant("text"), lambda value: value if type(value) is str else REFUSED),
            },
        ),
        "VQGANModel.encode": (pipe.vqgan.encode, {"pixel_values": Argument(pixels, near=PIXELS)}),
        "VQGANModel.decode_codes": (
            pipe.vqgan.decode_codes,
            {
                "codes": Argument(
                    codes,
                    near={
                        key: value for key, value in WRONG_CODES.items() if key not in ("no images", "expanded codes")
                    }
                    | {key: (make, REFUSED) for key, (make, _) in INTEGER_CODES.items()},
                )
            },
        ),
        "VQGANImageProcessor": (
            VQGANImageProcessor,
            {
                "size": Argument(constant(16), size_of),
                "num_channels": Argument(
                    constant(1), lambda value: value if type(value) is int and 1 <= value <= 1024 else REFUSED
                ),
                "aspect_ratio": Argument(constant("crop"), either("crop", "pad")),
            },
        ),
        "preprocess": (
            lambda **values: processor(**values)["pixel_values"],
            {
                "images": Argument(lambda: BYTES, near=IMAGES),
                "return_tensors": Argument(constant("pt"), either("pt", "np", None)),
            },
        ),
        "postprocess": (
            processor.postprocess,
            {
                "images": Argument(
                    pixels,
                    near={
                        **{name: PIXELS[name] for name in PIXELS if name not in ("double", "half", "an odd size")},
                        "double": (lambda: pixels(torch.float64), pixels()),
                        "NaN": (lambda: pixels(scale=math.nan), REFUSED),
                        "infinite": (lambda: pixels(scale=math.inf), REFUSED),
                    },
                ),
                "output_type": Argument(constant("np"), either_type),
            },
        ),
        "TokenLayout": (
            TokenLayout,
            {
                "num_codes": Argument(constant(32), whole(1, 2**31 - 1)),
                "class_names": Argument(
                    constant(NAMES),
                    names,
                    near={"list": (lambda: list(NAMES), NAMES)},
                ),
                "grid": Argument(
                    constant((4, 4)),
                    lambda value: tuple(value) if value == [1, 2] else REFUSED,
                    near={"list": (lambda: [4, 4], (4, 4)), "floats": (lambda: (4.0, 4.0), REFUSED)},
                ),
                "downsampling_factor": Argument(constant(4), whole(1, 2**31 - 1)),
                "tokenizer_fingerprint": Argument(constant("x"), lambda v: v if type(v) is str else REFUSED),
                "has_null": Argument(constant(True), either(True, False)),
            },
        ),
        "class_ids": (
            lambda class_labels: pipe.layout.class_ids(class_labels),
            {
                "class_labels": Argument(
                    constant([1, 2]),
                    lambda value: list(value) and labels(value) if isinstance(value, Listed) else REFUSED,
                    near={"text": (lambda: "ant", REFUSED)},
                )
            },
        ),
        "SamplingOptions": (
            SamplingOptions,
            {
                **SAMPLING,
                "guidance_scale": Argument(
                    constant(1.5), group_scales, near={"one is wrong": (lambda: (1.5, -1.0), REFUSED)}
                ),
            },
        ),
        "sample": (
            sampled,
            {
                "prompts": Argument(prompts(33), near=TOKENS),
                "null_prompts": Argument(prompts(35), near=TOKENS),
                "seeds": Argument(lambda: torch.tensor([1, 2]), near={"one": (lambda: torch.tensor([1]), REFUSED)}),
                "length": Argument(constant(16), whole(1, 16)),
                "num_codes": Argument(constant(32), whole(1, 32)),
                "options": Argument(lambda: SamplingOptions(guidance_scale=2.0)),
                "on_step": Argument(constant(None), either(None), near=CALLBACKS),
            },
        ),
        "evaluation config": (
            evaluation_config,
            {
                "samples_per_class": Argument(constant(5), read_as_whole),
                "feature_size": Argument(constant(8), read_as_whole),
                "classifier": Argument(constant("svc"), either("svc", "resnet")),
            },
        ),
    }


def draw_case(number: int) -> tuple[str, str, str, Callable[[], Any], Any]:
    """The call, the argument, and the value of a case: its name, how it is made, and what it stands for."""
    draw = generator("arguments", number)
    name = draw.choice(list(apis()))
    argument_name = draw.choice(list(apis()[name][1]))
    argument = apis()[name][1][argument_name]
    if argument.near and draw.random() < 0.6:
        value_name = draw.choice(list(argument.near))
        make, plain = argument.near[value_name]
        return name, argument_name, value_name, make, plain
    value_name = draw.choice(list(ANYTHING))
    make = ANYTHING[value_name]
    try:
        plain = argument.means(make())
    except (OverflowError, RuntimeError, TypeError, ValueError):
        plain = REFUSED
    return name, argument_name, value_name, make, plain


def called(name: str, **changes: Any) -> Any:
    call, arguments = apis()[name]
    torch.manual_seed(0)
    values = {key: argument.plain() for key, argument in arguments.items()} if name != "from_pretrained" else {}
    return call(**{**values, **changes})


def same(found: Any, expected: Any) -> bool:
    """Whether two results are the same numbers, texts and images."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, np.ndarray | Image.Image):
        return np.array_equal(np.asarray(found), np.asarray(expected))
    if isinstance(expected, VQGANImageProcessor):
        return bool(found.to_dict() == expected.to_dict())
    return type(found) is type(expected) and bool(found == expected)


def judge(name: str, argument: str, make: Callable[[], Any], plain: Any, folder: Path) -> str:
    """Runs a case; "" if the outcome is right, else what is wrong."""
    value = make()
    result = outcome(lambda: called(name, **{argument: value}), REFUSALS, folder)
    if isinstance(result, Exception):
        if name == "from_pretrained" and isinstance(result, OSError) and plain is not REFUSED:
            return ""  # there is no such folder: the arguments were accepted
        text = str(result)
        names = {"to": "device or dtype", "to dtype": "device or dtype"}.get(name, argument)
        names += "|guidance_scale" if argument == "class_labels" else ""  # guidance needs labels
        named = re.match(rf"({names})(\[\d+\])?[:.]", text)
        if isinstance(result, ConfigError):
            named = re.search(rf"^  - {argument}: ", text, re.MULTILINE)
        if plain is not REFUSED:
            return f"refused, though it stands for {plain!r:.60}: {text:.200}"
        return "" if named and len(text) < 500 else f"raw: {type(result).__name__}: {text:.200}"
    if plain is REFUSED:
        return f"accepted: {result!r:.100}"
    return "" if same(result, called(name, **{argument: plain})) else f"another result than {plain!r:.60} gives"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """The Hub answers nothing: an upload that starts fails."""
    monkeypatch.setattr("pipelines.hub.push", lambda *arguments, **options: "sent")


@cases(short=300, long=20_000)
def test_arguments_are_refused_by_name_or_mean_what_plain_values_mean(numbers, tmp_path):
    wrong = {}
    for case in numbers:
        name, argument, value_name, make, plain = draw_case(case)
        try:
            fault = judge(name, argument, make, plain, tmp_path)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = f"raw: {type(error).__name__}: {error!s:.200}"
        if fault:
            wrong[case] = f"{name}({argument}={value_name}): {fault}"
    assert not wrong, "\n".join(f"{case} {text}" for case, text in wrong.items())
