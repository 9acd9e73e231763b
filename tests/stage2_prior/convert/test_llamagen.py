"""Why `--from llamagen` is refused: all of LlamaGen's network is that of a Llama, except for its rotary positions.

Its table of rotations has a row and a column of the grid, and zeros for the class token, whose key is zero then.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SIDE, WIDTH, HEADS, LAYERS, CODES, CLASSES, INNER = 4, 64, 4, 2, 32, 5, 176
HEAD = WIDTH // HEADS


def table(side: int, head: int, zeros: bool = True) -> Tensor:
    """cos and sin `(2, 1 + side², head / 2)`: the class token, then the grid; half the angles are those of the row."""
    frequencies = 10000.0 ** (-torch.arange(0, head // 2, 2) / (head // 2))
    angles = torch.outer(torch.arange(side), frequencies)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    angles = torch.cat([rows, columns], -1).flatten(0, 1)
    first = torch.stack([torch.full_like(angles[:1], 0.0 if zeros else 1.0), torch.zeros_like(angles[:1])])
    return torch.cat([first, torch.stack([angles.cos(), angles.sin()])], 1)


def rotated(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i + 1) of `(B, T, heads, head)`."""
    cos, sin = rotations[:, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(3)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def llamagen(weights: dict[str, Tensor], classes: Tensor, codes: Tensor) -> Tensor:
    """LlamaGen's forward, written from its formulas."""
    x = torch.cat([weights["classes"][classes][:, None], weights["codes"][codes]], 1)
    rotations = table(SIDE, HEAD)[:, : x.shape[1]]
    for layer in range(LAYERS):
        parts = (norm(x, weights[f"{layer}.norm1"]) @ weights[f"{layer}.wqkv"].T).unflatten(-1, (3, HEADS, HEAD))
        query, key, value = parts.unbind(2)
        heads = [part.transpose(1, 2) for part in (rotated(query, rotations), rotated(key, rotations), value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + attended @ weights[f"{layer}.wo"].T
        inside = norm(x, weights[f"{layer}.norm2"])
        gated = F.silu(inside @ weights[f"{layer}.w1"].T) * (inside @ weights[f"{layer}.w3"].T)
        x = x + gated @ weights[f"{layer}.w2"].T
    return norm(x, weights["norm"]) @ weights["output"].T


def random_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"classes": (CLASSES + 1, WIDTH), "codes": (CODES, WIDTH), "output": (CODES, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"{layer}.wqkv": (3 * WIDTH, WIDTH), f"{layer}.wo": (WIDTH, WIDTH)}
        shapes |= {f"{layer}.w1": (INNER, WIDTH), f"{layer}.w3": (INNER, WIDTH), f"{layer}.w2": (WIDTH, INNER)}
    drawn = {name: 2 * torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
    norms = ["norm", *(f"{layer}.norm{number}" for layer in range(LAYERS) for number in (1, 2))]
    return drawn | {name: 1 + 0.1 * torch.randn(WIDTH) for name in norms}


def stock_llama(weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """The same weights in a Llama, whose pairs of a head are (i, i + head / 2)."""
    config = LlamaConfig(
        vocab_size=CODES + CLASSES + 1,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    state = {
        "model.embed_tokens.weight": torch.cat([weights["codes"], weights["classes"]]),
        "model.norm.weight": weights["norm"],
        "lm_head.weight": torch.cat([weights["output"], torch.zeros(CLASSES + 1, WIDTH)]),
    }
    pairs = torch.arange(WIDTH).view(HEADS, HEAD // 2, 2).transpose(1, 2).flatten()
    for layer in range(LAYERS):
        query, key, value = weights[f"{layer}.wqkv"].chunk(3)
        own = {
            **{"self_attn.q_proj": query[pairs], "self_attn.k_proj": key[pairs], "self_attn.v_proj": value},
            **{"self_attn.o_proj": weights[f"{layer}.wo"], "mlp.gate_proj": weights[f"{layer}.w1"]},
            **{"mlp.up_proj": weights[f"{layer}.w3"], "mlp.down_proj": weights[f"{layer}.w2"]},
            **{"input_layernorm": weights[f"{layer}.norm1"], "post_attention_layernorm": weights[f"{layer}.norm2"]},
        }
        state |= {f"model.layers.{layer}.{name}.weight": value for name, value in own.items()}
    model.load_state_dict(state)
    return model


class Table(nn.Module):
    """In place of the rotary positions of a Llama: LlamaGen's table."""

    def __init__(self, zeros: bool):
        super().__init__()
        self.rotations = table(SIDE, HEAD, zeros).repeat(1, 1, 2)

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotations
        return cos[position_ids], sin[position_ids]


@pytest.mark.parametrize(
    ("rotary", "is_exact"), [(Table(True), True), (None, False), (Table(False), False)], ids=["table", "stock", "class"]
)
@torch.no_grad()
def test_only_the_positions_and_the_key_of_the_class_differ_from_a_stock_llama(rotary, is_exact):
    """With LlamaGen's table, a Llama is exact; neither its own positions nor right angles with a class key are."""
    weights = random_weights()
    classes, codes = torch.tensor([0, 3, CLASSES]), torch.randint(CODES, (3, SIDE**2 - 1))
    model = stock_llama(weights)
    model.model.rotary_emb = rotary or model.model.rotary_emb
    found = model(torch.cat([CODES + classes[:, None], codes], 1)).logits[..., :CODES]
    error = (found - llamagen(weights, classes, codes)).abs().max()
    assert error < 1e-4 if is_exact else error > 1


def test_no_function_of_the_distance_is_near_the_scores_on_a_grid():
    """Stock rotary scores depend on the distance of two tokens in the sequence alone, whatever their frequencies."""
    side, places = 16, torch.arange(256)
    cos, sin = table(side, 64)[:, 1:].double()
    scores = cos[:, None] * cos + sin[:, None] * sin  # of equal unit vectors in each pair of dimensions
    distances = places[:, None] - places
    spread = torch.stack([scores[distances == d].amax(0) - scores[distances == d].amin(0) for d in range(1, 32)])
    halves = spread.amax(0).div(2).view(2, -1).amax(1)  # of rows, of columns
    assert halves.min() > 0.4 and halves.max() > 0.9
