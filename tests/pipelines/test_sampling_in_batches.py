"""A request that is sampled in several batches, and a sampler that serves several requests."""

import pytest
import torch

from pipelines import VQGANPipeline, pipeline_vqgan
from stage2_prior.sampling import memory as sampling_memory
from tests.devices import DEVICE


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipeline(tiny_runs) -> VQGANPipeline:
    """One that a test may change."""
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, **options):
    return pipeline.generate(
        [1, 2, 3], num_images_per_label=4, generator=seeded(), output_type="codes", **options
    ).codes


def test_batches_are_as_large_as_fit_the_memory(pipeline, monkeypatch, capfd):
    expected = generate(pipeline)
    token = 2 * 2 * 32 * 4  # keys and values of two layers, 32 wide, in float32
    needed = 16 * token + 64 * 8 * sampling_memory.NUMBERS_PER_CODE
    pipeline.set_progress_bar_config(disable=False)
    for images, batches in [(12.5, 1), (5.5, 3), (1.5, 12), (0.1, 12)]:
        free = int(images * needed / sampling_memory.USABLE)
        monkeypatch.setattr(sampling_memory, "free_memory", lambda device, free=free: free)
        assert torch.equal(generate(pipeline), expected)
        assert f"{16 * batches}/{16 * batches}" in capfd.readouterr().err  # one bar over all of them


def test_guidance_takes_two_rows_an_image(pipeline, monkeypatch):
    monkeypatch.setattr(sampling_memory, "free_memory", lambda device: 1_000_000)
    plain, guided = (sampling_memory.batch_size_that_fits(pipeline.prior, 16, guided) for guided in (False, True))
    assert 1 < guided < plain < 64
    monkeypatch.undo()
    largest = sampling_memory.LARGEST_BATCH.get(DEVICE.type, 64)
    assert sampling_memory.batch_size_that_fits(pipeline.prior, 16, True) == largest  # there is memory for as many


def test_a_large_batch_is_decoded_in_parts(pipeline, monkeypatch):
    whole = pipeline.generate([4], num_images_per_label=5, generator=seeded(), output_type="pt")
    monkeypatch.setattr(pipeline_vqgan, "PIXELS_AT_ONCE", 2 * 16 * 16)
    parts = pipeline.generate([4], num_images_per_label=5, generator=seeded(), output_type="pt")
    assert torch.equal(whole.codes, parts.codes)
    torch.testing.assert_close(whole.images, parts.images)


def test_a_sampler_is_kept_while_it_serves(pipeline):
    first = generate(pipeline)
    kept = pipeline._sampler
    assert torch.equal(generate(pipeline), first) and pipeline._sampler is kept
    generate(pipeline, top_k=5)
    assert pipeline._sampler is not kept


@torch.no_grad()
@pytest.mark.parametrize("change", ["written", "replaced", "cast"])
def test_a_sampler_is_not_kept_when_the_weights_change(pipeline, change):
    """What was recorded has the old ones."""
    generate(pipeline)
    head = pipeline.prior.lm_head
    if change == "written":
        head.weight.neg_()
    elif change == "replaced":
        head.weight = torch.nn.Parameter(-head.weight)
    else:
        pipeline.to(torch.bfloat16)
    assert torch.equal(generate(pipeline), generate(VQGANPipeline(**pipeline.components)))
