"""Attention of one token over the written places of the cache, as a Triton kernel.

The kernel reads the last written place from the device's memory, so one recorded step serves every place. One program
of one warp computes one row and one key-value head, with all queries that share the head. It reads the keys and values
of this head once, in memory order.

The places of a row are not split among programs, because this would not save time. At 256 codes, a program reads 8
blocks in a few microseconds, while the kernel launches of one layer take 30 microseconds for one image. From 11 guided
images on, a prior with 12 heads fills each of the 132 processors of an H200 with two programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Largest queries × width of a program, both padded to powers of two. Larger queries and a block of keys do not fit in
# the registers together.
LARGEST_GROUP = 512

# Places that a program reads at once. With 32, the 25 programs that fit on a processor fill its memory queue.
LARGEST_BLOCK = 32


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
    # all tensors have the axes (queries, places, width), so no value moves between threads
    group = tl.arange(0, GROUP_BLOCK)[:, None, None]
    block = tl.arange(0, BLOCK)[None, :, None]
    width = tl.arange(0, WIDTH_BLOCK)[None, None, :]
    queries = head * GROUP + group
    here = (group < GROUP) & (width < WIDTH)
    q = tl.load(query + row * query_row + queries * query_head + width, here, 0.0).to(tl.float32) * scaling
    key += row * key_row + head * key_head
    value += row * value_row + head * value_head

    # running softmax: largest score so far, sum of exponentials, weighted sum of values
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


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel supports tensors of these shapes; see `attend`."""
    return query.shape[2] == 1 and key.shape == value.shape and _padded(query, key) <= LARGEST_GROUP


@torch.library.custom_op("tessella::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor, last: Tensor, scaling: float) -> Tensor:
    """softmax(scaling · q kᵀ) v for one query of each head, over places 0 to `last`, computed in float32.

    Args:
        query: `(rows, heads, 1, width)`, float32, float16 or bfloat16.
        key, value: `(rows, key-value heads, places, width)`; adjacent query heads share a key-value head.
        last: int64 tensor with one element on the device, below the number of places.
        scaling: factor of the scores.

    Returns:
        `(rows, 1, heads, width)`, the order of axes that transformers expects.
    """
    rows, heads, _, width = query.shape
    key_value_heads = key.shape[1]
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
        GROUP=heads // key_value_heads,
        WIDTH=width,
        GROUP_BLOCK=triton.next_power_of_2(heads // key_value_heads),
        WIDTH_BLOCK=triton.next_power_of_2(width),
        BLOCK=min(LARGEST_BLOCK, 8 * LARGEST_GROUP // _padded(query, key)),
        num_warps=1,
    )
    return out


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, last: Tensor, scaling: float) -> Tensor:
    rows, heads, _, width = query.shape
    return query.new_empty(rows, 1, heads, width)


def _padded(query: Tensor, key: Tensor) -> int:
    group = triton.next_power_of_2(query.shape[1] // key.shape[1])
    return int(group * triton.next_power_of_2(query.shape[3]))
