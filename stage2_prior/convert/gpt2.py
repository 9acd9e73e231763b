"""A GPT of taming-transformers as a stock GPT-2 over our token layout, with the same logits of codes.

Both have learnt positions, a layer normalisation before attention and before the MLP (ε = 1e-5), biases, and an MLP of
four times the width. The original has the exact GELU, and an output layer of its own without bias. Its queries, keys
and values are three layers, those of GPT-2 one. GPT-2 stores the weights of its layers transposed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from stage2_prior.convert.taming import Original
from stage2_prior.prior import decided_by, generation_config
from stage2_prior.vocabulary import TokenLayout

# Names in the original and in GPT-2, of whole tensors and of the layers of a block.
SAME = {"ln_f.weight": "ln_f.weight", "ln_f.bias": "ln_f.bias"}
NORMS = {"ln1": "ln_1", "ln2": "ln_2"}
LINEAR = {"attn.proj": "attn.c_proj", "mlp.0": "mlp.c_fc", "mlp.2": "mlp.c_proj"}


def build_gpt2(original: Original, layout: TokenLayout) -> GPT2LMHeadModel:
    """Builds the GPT-2, in evaluation mode.

    Args:
        original: the prior.
        layout: token layout; its codes are the first tokens of the original.
    """
    config = GPT2Config(
        **decided_by(layout),
        n_embd=original.sizes["n_embd"],
        n_layer=original.sizes["n_layer"],
        n_head=original.num_heads,
        activation_function="gelu",
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=False,
        **original.dropout,  # type: ignore[arg-type]
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    weights = _network(original.weights, original.sizes["n_layer"]) | _tokens(original, layout)
    weights["transformer.wpe.weight"] = original.weights["pos_emb"][0, : config.n_positions].contiguous()
    model.load_state_dict(weights, assign=True)
    model.generation_config = generation_config(layout)
    return model.eval()


def _tokens(original: Original, layout: TokenLayout) -> dict[str, Tensor]:
    """Rows of the embedding and of the output layer, in the order of the layout; rows that the original lacks are 0."""
    theirs, head = original.weights["tok_emb.weight"], original.weights["head.weight"]
    codes, classes = layout.num_codes, layout.num_classes
    ours, output = (theirs.new_zeros(layout.vocab_size, theirs.shape[1]) for _ in range(2))
    ours[:codes], output[:codes] = theirs[:codes], head[:codes]
    ours[codes : codes + classes] = theirs[:classes]
    if not classes:
        ours[layout.null_token] = theirs[original.start_code]
    return {"transformer.wte.weight": ours, "lm_head.weight": output}


def _network(weights: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    found = {f"transformer.{ours}": weights[theirs] for theirs, ours in SAME.items()}
    for layer in range(num_layers):
        found |= {f"transformer.h.{layer}.{name}": value for name, value in _block(weights, f"blocks.{layer}.").items()}
    return found


def _block(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    parts = [f"{prefix}attn.{part}" for part in ("query", "key", "value")]
    found = {
        "attn.c_attn.weight": torch.cat([weights[f"{part}.weight"] for part in parts]).T.contiguous(),
        "attn.c_attn.bias": torch.cat([weights[f"{part}.bias"] for part in parts]),
    }
    for theirs, ours in LINEAR.items():
        found[f"{ours}.weight"] = weights[f"{prefix}{theirs}.weight"].T.contiguous()
        found[f"{ours}.bias"] = weights[f"{prefix}{theirs}.bias"]
    for theirs, ours in NORMS.items():
        found |= {f"{ours}.{kind}": weights[f"{prefix}{theirs}.{kind}"] for kind in ("weight", "bias")}
    return found
