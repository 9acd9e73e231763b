"""Compares a prior that `stage2_prior.convert` has converted with stored results of the original code."""

import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from stage2_prior import SamplingOptions, TokenLayout, load_language_model, sample_codes
from stage2_prior.convert.__main__ import ConvertConfig, main
from stage2_prior.sampling.loop import filter_logits
from tests.devices import DEVICE
from tests.golden import GOLDEN, OUTPUTS, Found

NAME, CODES, GRID = "gpt_tiny", 80, (4, 8)


def load() -> tuple[PreTrainedModel, TokenLayout]:
    """The converted prior. Any token may be its condition, so each is a class."""
    with TemporaryDirectory() as above:
        folder = Path(above) / "prior"
        files = {"checkpoint": str(GOLDEN / f"{NAME}.safetensors"), "config": str(GOLDEN / f"{NAME}.json")}
        facts = {"num_classes": CODES, "grid": list(GRID), "downsampling_factor": 16}
        main(ConvertConfig(source="taming", output_dir=str(folder), **files, **facts))
        return load_language_model(folder).to(DEVICE), TokenLayout.from_pretrained(folder)  # type: ignore[arg-type]


def largest(found: Tensor, expected: Tensor) -> float:
    """The largest difference of an element."""
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


@torch.no_grad()
def compare() -> Iterator[Found]:
    """Compares every stored quantity but those of a model whose first tokens see each other, which is refused."""
    golden, (prior, layout) = load_file(GOLDEN / f"{NAME}.safetensors", device=str(DEVICE)), load()

    def moved(tokens: Tensor) -> Tensor:
        """Tokens of the original as ours: the first one is a class."""
        return torch.cat([layout.class_tokens(tokens[:, :1]), tokens[:, 1:]], 1)

    logits = prior(moved(golden["io.input_ids"])).logits[..., :CODES]
    yield Found("logits of the prior", "32 tokens", largest(logits, golden["io.logits"]), OUTPUTS)
    short = prior(moved(golden["io.input_ids"][:, :5])).logits[..., :CODES]
    yield Found("logits of the prior", "5 tokens", largest(short, golden["io.logits_short"]), OUTPUTS)
    embedded = prior.get_input_embeddings()(golden["io.input_ids"][:, :20])
    behind = prior(inputs_embeds=torch.cat([golden["io.embeddings"], embedded], 1)).logits[..., :CODES]
    error = largest(behind, golden["io.logits_with_embeddings"])
    yield Found("logits of the prior", "behind embeddings", error, OUTPUTS)
    loss = F.cross_entropy(logits.flatten(0, 1), golden["io.targets"].flatten())
    yield Found("loss of the prior", "32 tokens", largest(loss, golden["io.loss"]), OUTPUTS)

    prompts, expected = moved(golden["io.greedy_cond"]), golden["io.greedy16"]
    length, options = expected.shape[1], SamplingOptions(temperature=0.0)
    seeds = torch.arange(len(prompts), device=DEVICE)
    found = {
        "generate of transformers": prior.generate(prompts, do_sample=False, max_new_tokens=length)[:, 1:],  # type: ignore[operator]
        "our sampler": sample_codes(prior, prompts, prompts, seeds, length, CODES, options),
    }
    for case, codes in found.items():
        yield Found("greedy codes that differ", case, float((codes != expected).sum()), 0.0)
    for name, expected in golden.items():
        if match := re.fullmatch(r"io\.filtered_k(\d+)_p([\d.]+)", name):
            options = SamplingOptions(top_k=int(match[1]), top_p=float(match[2]))
            probabilities = filter_logits(golden["io.logits"][:, -1], options).softmax(-1)
            case = f"k {options.top_k}, p {options.top_p}"
            yield Found("probabilities after filters", case, largest(probabilities, expected), OUTPUTS)
