"""The format of compressed images: a header that says what can decode them, then the bits of the range coder.

| bytes | content |
| --- | --- |
| 4 | MAGIC |
| 1 | version of the format: 2 if other conditions than the class are given, else 1 |
| 1 | dtype of the prior, its place in DTYPES |
| 1 | which conditions are given: bit n is 1 if the images have the condition n of the prompt |
| 8, 8 | hashes of the tokenizer's fingerprint and of the prior's weights |
| 2, 2, 4 | h and w of the code grid, and L, number of codes of an image |
| 4, 2, 2 | number of images, images in one forward, and threads of the CPU |
| 4 | CRC-32 of the codes |
| … | the bits: each given condition of all images, then codes batch by batch, position by position |
| 4 | CRC-32 of all before |

All numbers are unsigned, and little-endian.
"""

import struct
import zlib
from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from configs.arguments import described
from stage2_prior import CLASS, Segment, TokenLayout

MAGIC = b"\x89TSL"  # the first byte is no ASCII, so nothing takes the file for text
VERSION, CLASSES_ONLY = 2, 1  # of files with any conditions, and of files with the class or no condition
DTYPES = ("float32", "float64", "float16", "bfloat16")
LARGEST = 2**16 - 1  # batch size
MOST_CONDITIONS = 8
LARGEST_THREADS = 2**10  # the process ends if it cannot start as many

_HEADER = struct.Struct("<4sBBB8s8sHHIIHHI")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """The first bytes, in their order; see the table above."""

    magic: bytes
    version: int
    dtype: int
    given: int
    tokenizer: bytes
    prior: bytes
    grid_height: int
    grid_width: int
    length: int
    images: int
    batch_size: int
    threads: int
    codes: int


def header_of(
    layout: TokenLayout, prior: PreTrainedModel, codes: Tensor, given: Collection[str] = (), batch_size: int = 1
) -> Header:
    """The header of codes int64 `(N, L)`; `given` are the names of the conditions that are given.

    Raises:
        ValueError: a given condition is behind the eighth of the prompt.
    """
    places = [place for place, segment in enumerate(layout.conditions) if segment.name in given]
    if places and places[-1] >= MOST_CONDITIONS:
        name = layout.conditions[places[-1]].name
        raise ValueError(
            f"conditions: received {name!r}; compressed images can have the first {MOST_CONDITIONS} conditions of the "
            "prompt; leave it out"
        )
    return Header(
        magic=MAGIC,
        version=VERSION if set(given) - {CLASS} else CLASSES_ONLY,
        dtype=DTYPES.index(str(prior.dtype).removeprefix("torch.")),
        given=sum(1 << place for place in places),
        tokenizer=xxhash.xxh3_64_digest(layout.tokenizer_fingerprint.encode()),
        prior=fingerprint_of_prior(prior),
        grid_height=layout.grid[0],
        grid_width=layout.grid[1],
        length=layout.length,
        images=len(codes),
        batch_size=batch_size,
        threads=min(torch.get_num_threads(), LARGEST_THREADS),
        codes=checksum_of_codes(codes),
    )


def given_segments(header: Header, layout: TokenLayout) -> list[Segment]:
    """The conditions that the images have, in the order of the prompt."""
    return [segment for place, segment in enumerate(layout.conditions) if header.given >> place & 1]


def pack(header: Header, content: bytes) -> bytes:
    """The bytes of a compressed file."""
    data = _HEADER.pack(*astuple(header)) + content
    return data + _CHECKSUM.pack(zlib.crc32(data))


def unpack(data: Any) -> tuple[Header, bytes]:
    """Header and content of a compressed file.

    Raises:
        ValueError: these are not the bytes that `pack` made.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(f"data: received {described(data)}; must be the bytes that compress() returned")
    data = bytes(data)
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"data: received {len(data):,} bytes that compress() has not made: the first are no {MAGIC!r}")
    if len(data) > len(MAGIC) and data[len(MAGIC)] > VERSION:
        version = data[len(MAGIC)]
        raise ValueError(
            f"data: received version {version} of the format; this package reads up to {VERSION}, or the "
            "data are damaged"
        )
    body, end = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    whole = len(body) >= _HEADER.size and (len(body) - _HEADER.size) % 4 == 0
    if not whole or _CHECKSUM.unpack(end) != (zlib.crc32(body),):
        raise ValueError(
            f"data: received {len(data):,} bytes whose checksum is wrong: they are cut or damaged; get them again"
        )
    return Header(*_HEADER.unpack_from(body)), body[_HEADER.size :]


def require_same(header: Header, layout: TokenLayout, prior: PreTrainedModel) -> None:
    """Refuses data that another pipeline has compressed.

    Raises:
        ValueError: names what differs.
    """
    mine = header_of(layout, prior, torch.empty(0, layout.length))
    stored = DTYPES[header.dtype] if header.dtype < len(DTYPES) else f"number {header.dtype}"
    differences = {
        "tokenizer": (header.tokenizer == mine.tokenizer, "another tokenizer compressed them; load that pipeline"),
        "dtype": (header.dtype == mine.dtype, f"the prior had the dtype {stored}; load the pipeline with it"),
        "prior": (header.prior == mine.prior, "another prior compressed them; load that pipeline"),
        "grid": (
            (header.grid_height, header.grid_width, header.length) == (*layout.grid, layout.length),
            f"they hold images of {header.grid_height}×{header.grid_width} codes, this pipeline has "
            f"{layout.codes_text}",
        ),
        "given": (
            header.given < 1 << len(layout.conditions)
            and all(one.num_tokens for one in given_segments(header, layout)),
            "they have conditions that this pipeline does not have; load the one that compressed them",
        ),
        "images": (
            1 <= header.batch_size <= header.images,
            "the numbers of images in the header contradict each other",
        ),
        "threads": (header.threads <= LARGEST_THREADS, f"they ask for {header.threads:,} threads of the CPU"),
    }
    for equal, reason in differences.values():
        if not equal:
            raise ValueError(f"data: {reason}")


def checksum_of_codes(codes: Tensor) -> int:
    """CRC-32 of codes as 32-bit numbers."""
    return zlib.crc32(codes.cpu().numpy().astype("<u4").tobytes())


def fingerprint_of_prior(prior: PreTrainedModel) -> bytes:
    """8 bytes, the XXH3 hash of names and values of all weights in their dtype."""
    digest = xxhash.xxh3_64(prior.config.model_type.encode())
    for name, weight in sorted(prior.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
