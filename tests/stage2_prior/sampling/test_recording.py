"""Recorded steps give the codes of full forwards, for every architecture."""

import copy
import itertools
from types import MethodType

import numpy as np
import pytest
import torch

from stage2_prior import DecoderPool, SamplingOptions, sample, sample_codes
from stage2_prior.prior import build_prior
from stage2_prior.sampling import traced
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.sampling.decoders import make_decoder
from stage2_prior.sampling.graphs import GraphDecoder
from stage2_prior.sampling.recording import ROWS, disagreement, why_not_recordable
from stage2_prior.sampling.traced import TracedDecoder
from tests.devices import cpu_only
from tests.slow import few

pytestmark = cpu_only

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 4}
SWITCHED_ON = {**WINDOW, "use_sliding_window": True, "max_window_layers": 0}
SLIDING = {
    "mistral": WINDOW,
    "qwen2": SWITCHED_ON,
    "qwen3": {**SWITCHED_ON, **HEADS},
    "cohere2": WINDOW,
    "starcoder2": WINDOW,
    "gemma2": {**WINDOW, **HEADS},
    "gemma3_text": {**WINDOW, **HEADS},
}
RECORDED = {
    "mistral": {"sliding_window": 16},  # as long as the sequence, so it hides no token
    "qwen2": {},
    "qwen3": HEADS,
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
}
PLAIN = {
    **SLIDING,
    "llama": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "bloom": {"n_head": 4},
}


def make(model_type, layout, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_prior({**SIZES, "model_type": model_type, **settings}, layout).eval()


def greedy(prior, layout, count=10):
    prompts = layout.class_tokens(torch.arange(count) % 5)[:, None]
    options = SamplingOptions(temperature=0.0)
    return sample_codes(prior, prompts, prompts, torch.arange(count), layout.length, layout.num_codes, options)


@torch.no_grad()
def greedy_naively(prior, layout, count=10):
    tokens = layout.class_tokens(torch.arange(count) % 5)[:, None]
    for _ in range(layout.length):
        logits = prior(input_ids=tokens, use_cache=False).logits[:, -1, : layout.num_codes]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens[:, 1:]


@pytest.mark.parametrize("model_type", PLAIN)
def test_models_that_take_other_steps_elsewhere_are_sampled_plainly(layout, model_type, caplog):
    prior = make(model_type, layout, **PLAIN[model_type])
    assert why_not_recordable(prior, layout.length) is not None
    assert type(make_decoder(prior, 2, layout.length, layout.num_codes)) is EagerDecoder
    assert torch.equal(greedy(prior, layout), greedy_naively(prior, layout))


@pytest.mark.parametrize("model_type", few(RECORDED, "mistral", "granite", "llama"))
def test_models_with_full_attention_are_recorded(layout, model_type):
    prior = make(model_type, layout, **RECORDED[model_type])
    assert type(make_decoder(prior, 2, layout.length, layout.num_codes)) is TracedDecoder
    assert torch.equal(greedy(prior, layout), greedy_naively(prior, layout))


@pytest.mark.parametrize(
    ("model_type", "decoder"),
    few(
        itertools.product(SLIDING, [TracedDecoder, GraphDecoder]),
        ("mistral", TracedDecoder),
        ("qwen3", GraphDecoder),
        ("gemma2", TracedDecoder),
    ),
)
def test_the_comparison_finds_a_window_by_itself(layout, model_type, decoder):
    """This holds even if the configuration of a model does not state its sliding window."""
    prior = make(model_type, layout, **SLIDING[model_type])
    found = disagreement(prior, decoder(prior, ROWS, layout.length), layout.length, layout.num_codes)
    assert found is not None and "differ" in found


def test_a_slower_way_is_said_once(layout, caplog):
    prior = make("starcoder2", layout, sliding_window=5)
    for _ in range(3):
        make_decoder(prior, 2, layout.length, layout.num_codes)
    said = [record.message for record in caplog.records if "starcoder2" in record.message]
    assert len(said) <= 1  # an earlier test may have logged the warning


def test_compiling_is_refused_where_nothing_can_be_recorded(layout):
    prior = make("mistral", layout, sliding_window=4)
    with pytest.raises(ValueError, match=r"compiled: .*mistral.*sliding_attention"):
        make_decoder(prior, 2, layout.length, layout.num_codes, compiled=True)


def pooled(pool, prior, layout, options):
    prompts = layout.class_tokens(torch.arange(4) % 5)[:, None]
    nulls = torch.full_like(prompts, layout.null_token)
    with pool.borrow(prior, 8) as decoder:
        settings = SamplingOptions(**options)
        return sample(decoder, prompts, nulls, torch.arange(4), layout.length, layout.num_codes, settings), decoder


def written(prior, write):
    def change():
        with torch.no_grad():
            write(prior.lm_head.weight)

    return change


def numpy_write(weight):
    weight.detach().numpy()[:] *= -1


def data_write(weight):
    weight.data.neg_()


def data_replaced(weight):
    weight.data = -weight.data


CHANGES = {
    "written in place": lambda prior: written(prior, lambda weight: weight.neg_()),
    "written through .data": lambda prior: written(prior, data_write),
    ".data replaced": lambda prior: written(prior, data_replaced),
    "written through numpy": lambda prior: written(prior, numpy_write),
    "a buffer written": lambda prior: lambda: prior.model.rotary_emb.inv_freq.mul_(3),
    "a buffer replaced": lambda prior: (
        lambda: setattr(prior.model.rotary_emb, "inv_freq", prior.model.rotary_emb.inv_freq * 3)
    ),
    "a parameter replaced": lambda prior: (
        lambda: setattr(prior.lm_head, "weight", torch.nn.Parameter(-prior.lm_head.weight.detach()))
    ),
    "a forward replaced": lambda prior: (
        lambda: setattr(
            prior.lm_head,
            "forward",
            MethodType(lambda self, x: -torch.nn.functional.linear(x, self.weight), prior.lm_head),
        )
    ),
    "a hook added": lambda prior: lambda: prior.lm_head.register_forward_hook(lambda module, args, out: -out),
    "a setting changed": lambda prior: lambda: setattr(prior.model.norm, "variance_epsilon", 10.0),
    "a part replaced": lambda prior: lambda: setattr(prior, "lm_head", copy.deepcopy(prior.lm_head).apply(negate)),
}


@torch.no_grad()
def negate(module):
    module.weight.neg_()


@pytest.mark.parametrize(
    ("change", "weights"),
    few(
        itertools.product(CHANGES, ["copied", "shared"]),
        ("written in place", "shared"),
        ("written through numpy", "copied"),
        ("a buffer written", "copied"),
        ("a parameter replaced", "copied"),
        ("a setting changed", "copied"),
        ("a part replaced", "shared"),
    ),
)
def test_a_prior_that_changes_is_never_sampled_as_it_was(layout, change, weights, monkeypatch):
    monkeypatch.setattr(traced, "LARGE_MATRIX", {"copied": 0, "shared": traced.LARGE_MATRIX}[weights])
    prior = make("llama", layout)
    pool = DecoderPool(layout.length, layout.num_codes)
    options = {"guidance_scale": 2.0}
    before, _ = pooled(pool, prior, layout, options)
    CHANGES[change](prior)()
    after, decoder = pooled(pool, prior, layout, options)
    assert isinstance(decoder, TracedDecoder)
    expected, _ = pooled(DecoderPool(layout.length, layout.num_codes), copy.deepcopy(prior), layout, options)
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_a_recording_depends_on_shapes_and_not_on_options(layout, monkeypatch):
    prior = make("llama", layout)
    pool = DecoderPool(layout.length, layout.num_codes)
    _, first = pooled(pool, prior, layout, {})
    for options in ({"temperature": 0.5}, {"top_k": 3, "guidance_scale": 1.5}, {"top_p": 0.5, "min_p": 0.1}):
        assert pooled(pool, prior, layout, options)[1] is first
    with pool.borrow(prior, 2) as other:
        assert other is not first and other.recording is first.recording


def test_numbers_of_numpy_are_the_weights(layout):
    """`numpy_write` depends on this."""
    weight = torch.zeros(2, requires_grad=True)
    weight.detach().numpy()[:] = np.ones(2)
    assert weight.detach().tolist() == [1.0, 1.0]
