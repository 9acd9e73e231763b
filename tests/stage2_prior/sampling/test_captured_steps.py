"""Steps that are captured once and replayed, and steps that are compiled: the codes are those of steps that are not."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from stage2_prior import SamplingOptions, sample_codes
from stage2_prior.sampling import loop as sampling
from stage2_prior.sampling.captured_steps import CapturedSteps
from stage2_prior.sampling.loop import CodeSampler
from tests import cuda_graphs
from tests.devices import cpu_only

pytestmark = cpu_only  # tests/test_devices.py has real graphs

OPTIONS = [
    {},
    {"guidance_scale": 2.0, "top_p": 0.9},
    {"guidance_scale": 3.0, "guidance_schedule": "linear", "guidance_interval": (0.25, 0.7), "top_k": 12},
    {"temperature": 0.0, "min_p": 0.1},
]


def asked(layout, count, first_seed=100):
    prompts = layout.class_tokens(torch.arange(count) % 5)[:, None]
    return prompts, torch.full_like(prompts, layout.null_token), torch.arange(first_seed, first_seed + count)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_replayed_steps_choose_the_same_codes(random_prior, layout, model_type, options, monkeypatch):
    cuda_graphs.install(monkeypatch)
    monkeypatch.setattr(sampling, "BUCKET", 6)
    prior, options = random_prior(model_type, layout), SamplingOptions(**options)
    sampler = CodeSampler(prior, 5, 1, layout.length, layout.num_codes, options)
    sampler.captured = captured = CapturedSteps(sampler.position, compiled=False, captures=True)
    for count, seed in [(5, 100), (3, 7)]:  # the second is filled up, and replays the graphs of the first
        wanted = asked(layout, count, seed)
        codes = sampler.sample(*wanted)
        assert torch.equal(codes, sample_codes(prior, *wanted, layout.length, layout.num_codes, options))
        graphs = captured.graphs.copy()
    assert graphs == captured.graphs
    assert sum(graph.replays for graph in graphs.values()) == 2 * layout.length
    assert {window for _, window in graphs} == {6, 12, layout.length}


@pytest.mark.slow
def test_a_step_compiles_whole_and_once_for_all_positions_of_a_window(random_prior, layout, monkeypatch):
    """Also where torch.compile would have given up by itself, after as many steps as its limit."""
    monkeypatch.setattr(sampling, "BUCKET", 8)
    compile_with, counter = torch.compile, CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda step, **how: compile_with(step, backend=counter, **how))
    prior, options = random_prior("llama", layout), SamplingOptions(guidance_scale=2.0, top_p=0.9)
    wanted = asked(layout, 3)
    expected = sample_codes(prior, *wanted, layout.length, layout.num_codes, options)
    with torch._dynamo.config.patch(recompile_limit=2):
        for samplers in (1, 2):
            sampler = CodeSampler(prior, 2 + samplers, 1, layout.length, layout.num_codes, options, compiled=True)
            assert torch.equal(sampler.sample(*wanted), expected)
            assert torch.equal(sampler.sample(*wanted), expected)
            assert counter.frame_count == 2 * samplers  # a window of 8, and of 16
