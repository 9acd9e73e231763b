"""A pipeline with a masked prior: its options, its folder and card, and the commands that use it."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from configs import load_config, run
from pipelines import VQGANPipeline
from pipelines.demo import actions
from pipelines.evaluate import EvaluationConfig
from pipelines.evaluation.generated import generate_samples
from pipelines.generate import GenerateConfig, generate
from stage2_prior import SamplingOptions, UnmaskingOptions, unmask
from stage2_prior.sampling import memory
from tests.devices import DEVICE


@pytest.fixture
def pipeline(masked_runs) -> VQGANPipeline:
    """A pipeline that a test may change."""
    pipeline = VQGANPipeline.from_pretrained(masked_runs.pipeline, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def codes_of(pipeline, labels=(1, 2, 3), **options):
    return pipeline.generate(list(labels), num_images_per_label=4, seed=0, output_type="codes", **options).codes


def test_the_options_reach_the_sampler(pipeline):
    layout = pipeline.layout
    prompts = layout.class_tokens(torch.tensor([1, 2, 3]).repeat_interleave(4))[:, None].to(DEVICE)
    for options, unmasking in [
        ({}, {}),
        ({"guidance_scale": 2.0}, {"num_steps": 5, "order": "confidence", "order_temperature": 20.0}),
        ({"temperature": 0.5}, {"order": "halton"}),
    ]:
        request = (prompts, torch.full_like(prompts, layout.null_token), torch.arange(12).to(DEVICE), 16, 32)
        options_, order = SamplingOptions(**options), UnmaskingOptions(**unmasking)
        expected = unmask(pipeline.prior, *request, options_, order, mask_token=layout.mask_token)
        assert torch.equal(codes_of(pipeline, **options, **unmasking), expected.view(-1, 4, 4))


def test_batches_and_copies_make_the_same_images(pipeline, monkeypatch, capfd):
    expected = codes_of(pipeline, guidance_scale=2.0)
    assert len(expected.flatten(1).unique(dim=0)) == 12
    pipeline.set_progress_bar_config(disable=False)
    token = 4 * memory.FEATURES_AT_ONCE * 32 + 4 * memory.LOGITS_AT_ONCE * 64
    for images, batches in [(12.5, 1), (5.5, 3), (0.1, 12)]:
        free = int(images * 2 * 17 * token / memory.USABLE)
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert torch.equal(codes_of(pipeline, guidance_scale=2.0), expected)
        assert f"{12 * batches}/{12 * batches}" in capfd.readouterr().err  # twelve steps for each batch
    monkeypatch.undo()
    for duplicate in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(codes_of(duplicate, guidance_scale=2.0), expected)


def test_a_callback_sees_every_step(pipeline):
    steps = []
    codes = codes_of(pipeline, num_steps=5, batch_size=8, callback_on_step_end=lambda *step: steps.append(step))
    assert [step for step, _ in steps] == [0, 1, 2, 3, 4] * 2
    assert all(found.shape == (6, 16) for _, found in steps) and (steps[0][1] == -1).any()
    assert torch.equal(torch.cat([steps[4][1], steps[9][1]]), codes.flatten(1))


def test_known_codes_stay(pipeline, capfd):
    layout = pipeline.layout
    prompts = layout.class_tokens(torch.tensor([1, 2, 3]))[:, None]
    known = torch.full((3, 16), 7)
    known[:, 3:5] = -1
    pipeline.set_progress_bar_config(disable=False)
    parts = pipeline._sampled(prompts, torch.arange(3), SamplingOptions(guidance_scale=2.0), 2, None, known)
    codes = torch.cat(list(parts)).flatten(1).cpu()
    assert torch.equal(codes[known >= 0], known[known >= 0]) and codes.min() >= 0
    assert "24/24" in capfd.readouterr().err  # also if two steps find all hidden codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 17}, "num_steps: received 17; must be a whole number from 1 to 16"),
        pytest.param({"num_steps": 0}, "num_steps: received 0", marks=pytest.mark.slow),
        ({"order": "raster"}, "order: received 'raster'; allowed are 'confidence', 'halton'"),
        ({"order": "halton", "order_temperature": 2.0}, "order_temperature: received 2.0; the order 'halton' has no"),
        pytest.param({"order_temperature": "hot"}, "order_temperature: received 'hot'", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_arguments_that_cannot_work(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate([1], **arguments)


@pytest.mark.parametrize("given", [{"num_steps": 8}, {"order": "confidence"}, {"order_temperature": 0.0}], ids=str)
def test_a_causal_prior_refuses_them(tiny_pipeline, given):
    (name,) = given
    with pytest.raises(ValueError, match=f"{name}: received .*this prior is causal: it chooses one code after another"):
        tiny_pipeline.generate([1], **given)


def test_a_prior_of_the_other_family_is_refused(pipeline, tiny_pipeline):
    parts, others = pipeline.components, tiny_pipeline.components
    with pytest.raises(ValueError, match="prior: received LlamaForCausalLM; the layout is that of a masked prior"):
        VQGANPipeline(**{**parts, "prior": others["prior"]})
    with pytest.raises(ValueError, match="prior: received BertForMaskedLM; the layout is that of a causal prior"):
        VQGANPipeline(**{**others, "prior": parts["prior"]})


def test_saved_and_loaded_it_generates_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())["token_layout"]
    assert index["family"] == "masked" and index["tokens"]["mask"] == 1
    again = VQGANPipeline.from_pretrained(tmp_path / "copy", device=DEVICE)
    again.set_progress_bar_config(disable=True)
    assert again.layout == pipeline.layout and torch.equal(codes_of(again), codes_of(pipeline))
    half = VQGANPipeline.from_pretrained(tmp_path / "copy", dtype=torch.bfloat16, device=DEVICE)
    assert codes_of(half).max() < 32


def test_an_index_of_the_other_family_is_refused(masked_runs, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(masked_runs.pipeline, folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["token_layout"]["family"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "checksums.json").unlink()
    with pytest.raises(ValueError, match="weights"):
        VQGANPipeline.from_pretrained(folder)


def test_the_card_is_about_a_masked_prior_and_its_code_runs(masked_runs, tmp_path, monkeypatch):
    text = (masked_runs.pipeline / "README.md").read_text()
    assert "a masked language model (`bert`)" in text.replace("\n", " ") and "causal" not in text
    assert "a hidden code is token 43" in text and "- masked-image-modeling" in text and "autoregressive" not in text
    (tmp_path / "path" / "or").mkdir(parents=True)
    (tmp_path / "path" / "or" / "repository").symlink_to(masked_runs.pipeline)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    assert len(names["images"]) == 4 and names["codes"].shape == (4, 4, 4)
    assert names["codes"].min() >= 0 and names["codes"].max() < 32 and len(names["codes"].unique()) > 4


def test_the_commands_take_steps_and_order(masked_runs, tiny_runs, pipeline, tmp_path, capsys):
    options = ["--class_labels=3,7", "--seed=5", "--num_steps=4", "--order_temperature=0", f"--output_dir={tmp_path}"]
    run(GenerateConfig, generate, "command", [str(masked_runs.pipeline), *options, f"--device={DEVICE}"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = pipeline.generate([3, 7], seed=5, num_steps=4, order_temperature=0.0).images
    assert [(line["num_steps"], line["order_temperature"]) for line in lines] == [(4, 0.0)] * 2
    for line, image in zip(lines, expected, strict=True):
        assert "order" not in line and np.array_equal(np.asarray(Image.open(line["file"])), np.asarray(image))
    with pytest.raises(SystemExit):
        run(GenerateConfig, generate, "command", [str(tiny_runs.pipeline), *options, "--overwrite"])
    assert "num_steps: received 4; this prior is causal" in capsys.readouterr().err


def test_evaluation_takes_steps_and_order(masked_runs, pipeline, tmp_path):
    values = {"pipeline": str(masked_runs.pipeline), "data": {"dataset": "digits"}, "output_dir": str(tmp_path)}
    values |= {"samples_per_class": 2, "guidance_scale": 2.0, "num_steps": 3, "order": "halton"}
    samples, classes = generate_samples(load_config(EvaluationConfig, overrides=values), pipeline)
    generator, options = torch.Generator().manual_seed(0), {"guidance_scale": 2.0, "num_steps": 3, "order": "halton"}
    labels = np.repeat(range(10), 2)
    expected = pipeline.generate(labels, generator=generator, output_type="pt", **options).images.cpu()
    torch.testing.assert_close(samples, (expected * 255).round() / 127.5 - 1)
    assert classes.keys() == {"class"} and np.array_equal(classes["class"], labels)


def test_the_demo_app_counts_steps(pipeline):
    shown = []
    images = actions.generate(pipeline, 8, [3, 7], 2, 41, 1.5, lambda done, total: shown.append((done, total)))
    assert shown == [(4 * step, 48) for step in range(1, 13)]
    assert [caption for _, caption in images] == ["3 · seed 41", "3 · seed 42", "7 · seed 43", "7 · seed 44"]
