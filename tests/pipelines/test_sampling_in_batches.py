"""Sampling of one request in several batches, and several requests to one pipeline."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipelines import VQGANPipeline, chunks
from stage2_prior.sampling import memory
from tests.devices import DEVICE
from tests.slow import few


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipeline(tiny_runs) -> VQGANPipeline:
    """A pipeline that a test may change."""
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
    needed = 16 * token + 64 * 8 * memory.NUMBERS_PER_CODE
    pipeline.set_progress_bar_config(disable=False)
    for images, batches in [(12.5, 1), (5.5, 3), (1.5, 12), (0.1, 12)]:
        free = int(images * needed / memory.USABLE)
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert torch.equal(generate(pipeline), expected)
        assert f"{16 * batches}/{16 * batches}" in capfd.readouterr().err  # one progress bar for all batches


def test_guidance_takes_two_rows_an_image(pipeline, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    plain, guided = (memory.batch_size_that_fits(pipeline.prior, 16, rows) for rows in (1, 2))
    assert 1 < guided < plain < 64
    monkeypatch.undo()
    largest = memory.LARGEST_BATCH.get(DEVICE.type, 64)
    assert memory.batch_size_that_fits(pipeline.prior, 16, True) == largest  # the memory suffices for the upper limit


@pytest.mark.parametrize("images", few([1, 2, 5], 2))
def test_encoding_and_decoding_take_as_many_images_as_fit(pipeline, monkeypatch, images):
    """Images have 16 × 16 pixels; feature maps have at most 8 channels in float32."""
    whole = pipeline.generate([4], num_images_per_label=5, generator=seeded(), output_type="pt")
    codes, decoded = pipeline.encode(whole.images), pipeline.decode(whole.codes, "pt")
    sizes = []
    for name in ("encode", "decode"):
        method = getattr(pipeline.vqgan, name)
        monkeypatch.setattr(pipeline.vqgan, name, lambda x, method=method: (sizes.append(len(x)), method(x))[1])
    needed = chunks.MAPS_AT_ONCE * 8 * 16 * 16 * 4
    free = int((images + 0.5) * needed / chunks.USABLE)
    monkeypatch.setattr(chunks, "free_memory", lambda device: free)
    parts = pipeline.generate([4], num_images_per_label=5, generator=seeded(), output_type="pt", batch_size=5)
    assert torch.equal(whole.codes, parts.codes)
    torch.testing.assert_close(whole.images, parts.images)
    assert torch.equal(pipeline.encode(whole.images), codes)
    torch.testing.assert_close(pipeline.decode(whole.codes, "pt"), decoded)
    assert max(sizes) == images and sum(sizes) == 15


def test_a_request_keeps_its_own_state(pipeline):
    """Concurrent requests with equal and different options return the same images as sequential requests."""
    alike, other = {"class_labels": [1, 2, 3], "guidance_scale": 2.0}, {"class_labels": [4], "top_k": 5}
    requests = [alike, alike, alike, other] * 4

    def answer(number):
        return pipeline.generate(**requests[number], generator=seeded(number), output_type="codes").codes

    one_by_one = [answer(number) for number in range(len(requests))]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(answer, range(len(requests))))
    assert all(map(torch.equal, one_by_one, together))


def test_a_callback_may_generate(pipeline):
    inner = []
    expected = generate(pipeline)

    def callback(position, codes):
        if position == 7:
            inner.append(generate(pipeline))

    assert torch.equal(generate(pipeline, callback_on_step_end=callback), expected)
    assert torch.equal(inner[0], expected)


def test_a_callback_may_keep_what_it_gets(pipeline):
    kept = []
    codes = generate(pipeline, batch_size=4, callback_on_step_end=lambda position, codes: kept.append(codes))
    columns = [torch.stack(kept[first : first + 16], 1) for first in range(0, len(kept), 16)]
    assert torch.equal(torch.cat(columns), codes.flatten(1))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, pytest.param(lambda pipeline: pickle.loads(pickle.dumps(pipeline)), marks=pytest.mark.slow)],
)
def test_a_pipeline_that_has_generated_can_be_copied(pipeline, duplicate):
    expected = generate(pipeline)
    assert torch.equal(generate(duplicate(pipeline)), expected)


@torch.no_grad()
@pytest.mark.parametrize("change", few(["written", "replaced", "cast"], "replaced"))
def test_weights_that_change_are_used(pipeline, change):
    """tests/stage2_prior/sampling/test_recording.py tests more ways to change the weights."""
    generate(pipeline)
    head = pipeline.prior.lm_head
    if change == "written":
        head.weight.neg_()
    elif change == "replaced":
        head.weight = torch.nn.Parameter(-head.weight)
    else:
        pipeline.to(torch.bfloat16)
    assert torch.equal(generate(pipeline), generate(VQGANPipeline(**pipeline.components)))


@torch.no_grad()
def test_another_prior_in_its_place_is_sampled(pipeline):
    before = generate(pipeline)
    pipeline.prior = copy.deepcopy(pipeline.prior)
    pipeline.prior.lm_head.weight.neg_()
    after = generate(pipeline)
    assert torch.equal(after, generate(VQGANPipeline(**pipeline.components))) and not torch.equal(after, before)
