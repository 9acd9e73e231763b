"""Captured and compiled steps give the same codes as the plain step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from stage2_prior import SamplingOptions, sample
from stage2_prior.sampling import graphs
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.sampling.decoders import make_decoder
from stage2_prior.sampling.graphs import GraphDecoder
from tests import cuda_graphs
from tests.devices import cpu_only
from tests.slow import few

pytestmark = cpu_only  # tests/test_devices.py tests real graphs

OPTIONS = [
    {},
    {"guidance_scale": 2.0, "top_p": 0.9},
    {"guidance_scale": 3.0, "guidance_schedule": "linear", "guidance_interval": (0.25, 0.7), "top_k": 12},
    {"guidance_scale": ((2.5, 1.0, 3.0, 1.0, 0.0),)},  # a scale for each image
    {"temperature": 0.0, "min_p": 0.1},
]


def draw(decoder, layout, count, options, first_seed=100):
    prompts = layout.class_tokens(torch.arange(count) % 5)[:, None]
    nulls, seeds = torch.full_like(prompts, layout.null_token), torch.arange(first_seed, first_seed + count)
    return sample(decoder, prompts, nulls, seeds, layout.length, layout.num_codes, SamplingOptions(**options))


def captured(prior, layout, rows):
    """A decoder whose steps are captured as the graphs of tests/cuda_graphs.py."""
    decoder = GraphDecoder(prior, rows, layout.length)
    decoder.captures = True
    return decoder


@pytest.mark.parametrize(
    ("model_type", "options"),
    few(
        [(model_type, options) for model_type in ("llama", "gpt2", "qwen3") for options in OPTIONS],
        ("llama", OPTIONS[2]),
        ("llama", OPTIONS[3]),
        ("gpt2", OPTIONS[1]),
        ("qwen3", OPTIONS[4]),
    ),
    ids=str,
)
def test_replayed_steps_choose_the_same_codes(random_prior, layout, model_type, options, monkeypatch):
    cuda_graphs.install(monkeypatch)
    monkeypatch.setattr(graphs, "BUCKET", 6)
    prior = random_prior(model_type, layout)
    decoder, eager = captured(prior, layout, 10), EagerDecoder(prior, 10, layout.length)
    found, replays = [], []
    for seed in (100, 7):  # the second request replays the graphs of the first
        assert torch.equal(draw(decoder, layout, 5, options, seed), draw(eager, layout, 5, options, seed))
        found.append(decoder.graphs.copy())
        replays.append(sum(graph.replays for graph in decoder.graphs.values()))
    assert found[0] == found[1] and {window for _, window in decoder.graphs} == {6, 12, layout.length}
    assert replays == [layout.length - 1, 2 * layout.length - 1]  # the very first token allocates the cache


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_steps_in_windows_see_nothing_beyond_what_is_written(random_prior, layout, model_type, monkeypatch):
    monkeypatch.setattr(graphs, "BUCKET", 6)
    prior, options = random_prior(model_type, layout), {"guidance_scale": 3.0, "guidance_interval": (0.25, 0.7)}
    decoder = GraphDecoder(prior, 30, layout.length)
    with torch.inference_mode():  # fills the memory with other keys and values
        decoder.read(slice(0, 30), torch.randint(layout.num_codes, (30, layout.length)), 0)
    expected = draw(EagerDecoder(prior, 30, layout.length), layout, 15, options)
    assert torch.equal(draw(decoder, layout, 15, options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_a_compiled_step_chooses_the_same_codes(random_prior, layout, model_type):
    prior, options = random_prior(model_type, layout), {"guidance_scale": 2.0, "top_p": 0.9}
    decoder = make_decoder(prior, 30, layout.length, layout.num_codes, compiled=True)
    assert isinstance(decoder, GraphDecoder)
    expected = draw(EagerDecoder(prior, 30, layout.length), layout, 15, options)
    assert torch.equal(draw(decoder, layout, 15, options), expected)


@pytest.mark.slow
def test_a_step_compiles_once_for_all_places_of_a_window(random_prior, layout, monkeypatch):
    """This holds even beyond the default limit of versions that torch.compile compiles."""
    monkeypatch.setattr(graphs, "BUCKET", 8)
    compile_with, counter = torch.compile, CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda step, **how: compile_with(step, backend=counter, **how))
    prior, options = random_prior("llama", layout), {"guidance_scale": 2.0, "top_p": 0.9}
    with torch._dynamo.config.patch(recompile_limit=2):
        for decoders, images in ((1, 3), (2, 4)):  # another number of rows needs other steps
            expected = draw(EagerDecoder(prior, 2 * images, layout.length), layout, images, options)
            decoder = GraphDecoder(prior, 2 * images, layout.length, compiled=True)
            assert torch.equal(draw(decoder, layout, images, options), expected)
            assert torch.equal(draw(decoder, layout, images, options), expected)
            assert counter.frame_count == 2 * decoders  # a window of 8, and of 16
