"""A saved prior, loaded by transformers alone, generates codes only."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from stage2_prior import SamplingOptions, sample_codes
from tests.devices import DEVICE
from tests.tiny import RANDOM_PRIORS

# Every argument is a folder that holds a prior in its folder "prior", and the token of a class.
GENERATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
said = []
for folder, first in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    prior = AutoModelForCausalLM.from_pretrained(folder, subfolder="prior")
    torch.manual_seed(0)
    prompts = torch.arange(first, first + 5)[:, None]
    sampled, greedy = prior.generate(prompts.repeat(40, 1)), prior.generate(prompts, do_sample=False)
    said.append({"sampled": sampled[:, 1:].tolist(), "greedy": greedy[:, 1:].tolist()})
ours = sorted({"configs", "stage1_vqgan", "stage2_prior", "pipelines"} & set(sys.modules))
print(json.dumps({"said": said, "ours": ours}))
"""


@pytest.fixture(scope="module")
def priors(random_prior, layout):
    """A random prior of every architecture, whose most likely tokens are conditions."""
    made = {}
    for model_type in RANDOM_PRIORS:
        prior = made[model_type] = random_prior(model_type, layout)
        with torch.no_grad():
            prior.get_output_embeddings().weight[layout.num_codes :] *= 3
        prompts = torch.arange(layout.num_codes, layout.num_codes + 5, device=DEVICE)[:, None]
        assert (prior(input_ids=prompts).logits.argmax(-1) >= layout.num_codes).any()
    return made


@pytest.fixture(scope="module")
def said(priors, layout, tiny_runs, tmp_path_factory):
    """The tokens that transformers generates with these priors and with the prior of a pipeline.

    It runs in a process without this package.
    """
    folder = tmp_path_factory.mktemp("priors")
    arguments = [str(tiny_runs.pipeline), "32"]
    for name, prior in priors.items():
        prior.save_pretrained(folder / name / "prior")
        arguments += [str(folder / name), str(layout.num_codes)]
    command = [sys.executable, "-c", GENERATE, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] == []
    return dict(zip(["pipeline", *priors], found["said"], strict=True))


@pytest.mark.parametrize("name", ["pipeline", *RANDOM_PRIORS])
def test_bare_generate_returns_only_codes(said, layout, name):
    sampled = np.array(said[name]["sampled"])
    assert sampled.shape == (200, 16) and sampled.min() >= 0
    assert sampled.max() < (32 if name == "pipeline" else layout.num_codes)
    assert len(np.unique(sampled, axis=0)) == 200


@pytest.mark.parametrize("name", RANDOM_PRIORS)
def test_greedy_codes_are_those_of_our_sampler(said, priors, layout, name):
    prompts = torch.arange(layout.num_codes, layout.num_codes + 5, device=DEVICE)[:, None]
    options = SamplingOptions(temperature=0.0)
    seeds = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    codes = sample_codes(priors[name], prompts, prompts, seeds, layout.length, layout.num_codes, options)
    assert said[name]["greedy"] == codes.tolist()


def test_greedy_codes_are_those_of_the_pipeline(said, tiny_pipeline):
    codes = tiny_pipeline.generate(class_labels=list(range(5)), temperature=0.0, output_type="codes").codes
    assert said["pipeline"]["greedy"] == codes.flatten(1).tolist()
