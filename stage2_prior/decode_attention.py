"""Attention of one token, over exactly the positions that are there: a Triton kernel behind transformers' interface.

How many there are is read from the device's memory, so that one recorded step serves every position. One program has a
row and a key-value head, with all queries that share it, and reads its keys and values once, in order. Positions are
not split among programs: a program has 4 blocks to read at 256 codes, some 4 of the 30 µs that the launches of a layer
take for one image, and from about ten images on there is a program for each processor of a GPU anyway.
"""

import copy
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from stage2_prior.kv_cache import PreallocatedCache

# The name that models find it by.
NAME = "decode_one"

# Positions that are read at once, by one warp: all that it adds up then stays within it.
BLOCK = 32

# The widest head whose keys and values fit the registers of a warp.
WIDEST = 128

# What models hand to any attention, and the kernel need not know.
HARMLESS = {"dropout", "is_causal", "output_attentions", "position_ids", "use_cache"}


@triton.jit
def _attend(
    query,
    key,
    value,
    out,
    last,
    scaling,
    query_row,
    query_head,
    key_row,
    key_head,
    key_position,
    value_row,
    value_head,
    value_position,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    length = tl.load(last) + 1
    # all tensors are (queries, positions, width), so that nothing changes its place between threads
    group = tl.arange(0, GROUP_BLOCK)[:, None, None]
    block = tl.arange(0, BLOCK)[None, :, None]
    width = tl.arange(0, WIDTH_BLOCK)[None, None, :]
    queries = head * GROUP + group
    here = (group < GROUP) & (width < WIDTH)
    q = tl.load(query + row * query_row + queries * query_head + width, here, 0.0).to(tl.float32) * scaling
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head

    # softmax as it goes: the largest score so far, the sum of exponentials, and the weighted sum of values
    largest = tl.full([GROUP_BLOCK, 1, 1], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK, 1, 1], tl.float32)
    weighted = tl.zeros([GROUP_BLOCK, 1, WIDTH_BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        positions = start + block
        there = (positions < length) & (width < WIDTH)
        k = tl.load(key + positions * key_position + width, there, 0.0).to(tl.float32)
        v = tl.load(value + positions * value_position + width, there, 0.0).to(tl.float32)
        scores = tl.where(positions < length, tl.sum(q * k, 2, keep_dims=True), float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1, keep_dims=True))
        shrunk, exponentials = tl.exp(largest - larger), tl.exp(scores - larger)
        total = total * shrunk + tl.sum(exponentials, 1, keep_dims=True)
        weighted = weighted * shrunk + tl.sum(exponentials * v, 1, keep_dims=True)
        largest = larger

    attended = (weighted / total).to(out.dtype.element_ty)
    tl.store(out + (row * HEADS * GROUP + queries) * WIDTH + width, attended, here)


@torch.library.custom_op("tessella::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, last: Tensor, scaling: float) -> Tensor:
    """softmax(scaling · q kᵀ) v, for one query of each head, over positions 0 to `last`.

    Args:
        query: `(rows, heads, 1, width)`, float32, float16 or bfloat16; sums are float32.
        key: `(rows, key-value heads, positions, width)`; heads are a multiple of its heads.
        value: likewise.
        last: int64, one number, on the device.
        scaling: of the scores.

    Returns:
        `(rows, 1, heads, width)`, as transformers has it.
    """
    rows, heads, _, width = query.shape
    key_value_heads = key.shape[1]
    group = heads // key_value_heads
    out = query.new_empty(rows, 1, heads, width)
    _attend[(rows * key_value_heads,)](
        query,
        key,
        value,
        out,
        last,
        scaling,
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        HEADS=key_value_heads,
        GROUP=group,
        WIDTH=width,
        GROUP_BLOCK=triton.next_power_of_2(group),
        WIDTH_BLOCK=triton.next_power_of_2(width),
        BLOCK=BLOCK,
        num_warps=1,
    )
    return out


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, last: Tensor, scaling: float) -> Tensor:
    rows, heads, _, width = query.shape
    return query.new_empty(rows, 1, heads, width)
