"""Runs and pipelines on a GPU, compared with the CPU and with each other. `pytest --device cuda` runs these tests."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.checkpoints import complete_checkpoints
from configs.randomness import exponential, mix, uniform
from pipelines import VQGANPipeline
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage1_vqgan.training.run import train as train_tokenizer
from stage2_prior import CodeStore, TokenLayout
from stage2_prior.sampling import decoders, graphs
from stage2_prior.sampling.decoder import EagerDecoder
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_prior
from tests import process_runs, tiny
from tests.devices import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU, and `pytest --device cuda`")

GUIDED = {"guidance_scale": 2.0}
OPTIONS = [{}, GUIDED, {"guidance_scale": 3.0, "guidance_interval": (0.25, 0.7), "top_p": 0.95}]


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Restores the defaults of torch, because other tests need sums in a fixed order."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def make_pipeline(tiny_runs, random_prior):
    """Returns a function that makes a pipeline with a random prior of an architecture."""

    def make(model_type):
        layout = TokenLayout.from_pretrained(tiny_runs.prior)
        vqgan = VQGANModel.from_pretrained(tiny_runs.vqgan).to(DEVICE)
        processor = VQGANImageProcessor.from_pretrained(tiny_runs.vqgan)
        pipeline = VQGANPipeline(vqgan, random_prior(model_type, layout), processor, layout)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def generate(pipeline, numbers, batch_size=None, **options):
    """Generates one image for each number, which determines class and seed."""
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    labels = [number % 10 for number in numbers]
    return pipeline.generate(labels, generator=generators, batch_size=batch_size, output_type="pt", **options)


def assert_images_do_not_depend_on_their_batch(pipeline, **options):
    together = generate(pipeline, range(64), **options)
    assert together.codes.device.type == DEVICE.type and len(together.codes.unique(dim=0)) == 64
    for batch_size, numbers in [(7, range(64)), (1, range(0, 64, 16))]:
        out = generate(pipeline, numbers, batch_size, **options)
        assert torch.equal(out.codes, together.codes[list(numbers)])
        torch.testing.assert_close(out.images, together.images[list(numbers)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("model_type", tiny.RANDOM_PRIORS)
def test_an_image_does_not_depend_on_its_batch(make_pipeline, model_type, options):
    assert_images_do_not_depend_on_their_batch(make_pipeline(model_type), **options)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compiled steps are for CUDA")
@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "qwen3"))]
)
def test_nor_in_a_compiled_step_which_chooses_the_same_codes(make_pipeline, model_type):
    torch.compiler.reset()
    pipeline = make_pipeline(model_type)
    expected = generate(pipeline, range(64), **GUIDED).codes
    pipeline.compile()
    assert torch.equal(generate(pipeline, range(64), **GUIDED).codes, expected)
    assert_images_do_not_depend_on_their_batch(pipeline, **GUIDED)


@pytest.mark.parametrize("exact", [True, False], ids=["kernel", "windows"])
@pytest.mark.parametrize("options", [*OPTIONS, {**GUIDED, "temperature": 0.0}], ids=str)
@pytest.mark.parametrize("model_type", tiny.RANDOM_PRIORS)
def test_recorded_steps_choose_the_codes_of_single_ones(make_pipeline, monkeypatch, model_type, options, exact):
    """With the Triton attention, and with masked attention over several numbers of places."""
    if not exact:
        monkeypatch.setattr(graphs, "BUCKET", 6)
        monkeypatch.setattr(graphs, "use_decode_attention", lambda model: False)
    pipeline = make_pipeline(model_type)
    first, again = (generate(pipeline, range(20), **options).codes for _ in range(2))
    ((_, decoder),) = pipeline._sampler.decoders._free
    if DEVICE.type == "cuda":
        assert isinstance(decoder, graphs.GraphDecoder) and decoder.reads_exactly == exact
        counts, windows = zip(*decoder.graphs, strict=True)
        assert set(windows) == ({decoder.length} if exact else {6, 12, decoder.length})
        assert set(counts) == ({20} if not options else {20, 40} if "guidance_interval" in options else {40})
    monkeypatch.setattr(decoders, "why_not_recordable", lambda prior, length: "a test")
    plain = make_pipeline(model_type)
    assert torch.equal(first, again) and torch.equal(generate(plain, range(20), **options).codes, first)
    assert type(plain._sampler.decoders._free[0][1]) is EagerDecoder


def test_a_pipeline_that_moves_makes_the_same_images(make_pipeline):
    pipeline = make_pipeline("llama")
    there = generate(pipeline, range(10), **GUIDED)
    here = generate(pipeline.to("cpu"), range(10), **GUIDED)
    assert here.codes.device.type == "cpu" and torch.equal(here.codes, there.codes.cpu())
    torch.testing.assert_close(here.images, there.images.cpu(), rtol=0, atol=1e-4)
    again = generate(pipeline.to(DEVICE), range(10), **GUIDED)
    assert torch.equal(again.codes, there.codes)


def test_half_precision_and_a_generator_of_the_device(make_pipeline):
    pipeline = make_pipeline("llama").to(torch.bfloat16)
    first, again = (
        pipeline.generate([3] * 8, generator=torch.Generator(DEVICE).manual_seed(0), output_type="np", **GUIDED)
        for _ in range(2)
    )
    assert torch.equal(first.codes, again.codes) and (first.images == again.images).all()
    assert len(first.codes.unique(dim=0)) > 1


def test_random_numbers_are_those_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (500, 1), generator=generator)
    here = seeds, torch.tensor(17), torch.arange(1000)
    there = [keys.to(DEVICE) for keys in here]
    for draw in (mix, uniform):
        assert torch.equal(draw(*there[:1]).cpu(), draw(*here[:1]))
    assert torch.equal(uniform(*there).cpu(), uniform(*here))
    # float64 logarithms may differ by rounding, which is far below the precision of float32
    found, expected = exponential(*there).cpu(), exponential(*here)
    assert (found == expected).float().mean() > 0.9999
    torch.testing.assert_close(found, expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("name", ["vq", "ema", "lfq"])
@torch.no_grad()
def test_codes_and_images_are_those_of_the_cpu(name):
    torch.manual_seed(0)
    model = VQGANModel(
        VQGANConfig(**{**tiny.VQGAN, **(process_runs.WHOLE | process_runs.FURTHER).get(name, {})})
    ).eval()
    images = torch.rand(64, 1, 16, 16) * 2 - 1
    here = model(images)
    there = model.to(DEVICE)(images.to(DEVICE))
    assert len(here.codes.unique()) > 1 and torch.equal(there.codes.cpu(), here.codes)
    for value in ("latents", "quantized", "reconstruction"):
        torch.testing.assert_close(there[value].cpu(), here[value], rtol=1e-4, atol=1e-4)


def logged(run, name):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def interrupt(run, step):
    """Reduces the folder of a run to that of a run that was killed after the checkpoint of a step."""
    for checkpoint in complete_checkpoints(run):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    for name in ("train_results.json", "model.safetensors"):
        (Path(run) / name).unlink()


def test_both_stages_train_and_go_on_in_bf16(tmp_path):
    """Losses are finite and fall. A resumed run ends with nearly the same loss as the uninterrupted run."""
    changes = {"bf16": True, "logging_steps": 10, "dataloader_num_workers": 2}
    first = process_runs.stage1_config(tmp_path, max_steps=60, save_steps=30, learning_rate=1e-3, **changes)
    train_tokenizer(first)
    second = process_runs.stage2_config(tmp_path, max_steps=60, save_steps=30, eval_steps=30, **changes)
    assert len(CodeStore(tokenize(second).folder).split("train")) == 2 * 1437
    train_prior(second)
    for config, train, loss in ((first, train_tokenizer, "loss/l1"), (second, train_prior, "loss")):
        losses = logged(config.output_dir, loss)
        assert len(losses) == 6 and torch.tensor(losses).isfinite().all() and losses[-1] < 0.98 * losses[0]
        resumed = replace(config, output_dir=str(tmp_path / "resumed"))
        shutil.copytree(config.output_dir, resumed.output_dir)
        interrupt(resumed.output_dir, 30)
        train(resumed)
        again = logged(resumed.output_dir, loss)
        assert len(again) == 6 and again == pytest.approx(losses, rel=0.05)
        shutil.rmtree(resumed.output_dir)
