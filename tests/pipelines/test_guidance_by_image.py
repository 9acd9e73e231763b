"""Guidance with a scale for each prompt: each image is the same as alone with its own scale."""

import numpy as np
import pytest
import torch

from pipelines import VQGANPipeline
from stage2_prior.prior import build_prior
from tests import tiny
from tests.devices import DEVICE
from tests.slow import few

LABELS, SCALES = [3, 7, 1, 3], [2.5, 1.0, 6.0, 0.0]
SCHEDULES = [{}, {"guidance_schedule": "linear", "guidance_interval": (0.2, 0.9)}]


@pytest.fixture(scope="module", params=["causal", "masked"])
def pipeline(request, tiny_runs, masked_runs) -> VQGANPipeline:
    runs = {"causal": tiny_runs, "masked": masked_runs}[request.param]
    pipeline = VQGANPipeline.from_pretrained(runs.pipeline, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    config = {"causal": tiny.RANDOM_PRIORS["llama"], "masked": tiny.MASKED_PRIORS["bert"]}[request.param]
    pipeline.prior = build_prior(config, pipeline.layout).eval().to(DEVICE)  # the class counts more than in a tiny run
    return pipeline


@pytest.mark.parametrize("settings", few(SCHEDULES, SCHEDULES[-1]), ids=str)
def test_each_image_is_that_of_its_own_scale(pipeline, settings):
    asked = {"num_images_per_label": 2, "seed": 0, "output_type": "codes", "batch_size": 3, **settings}
    out = pipeline.generate(LABELS, guidance_scale=SCALES, **asked)
    unguided = pipeline.generate(LABELS, **asked)
    for n in range(8):
        label, scale = LABELS[n // 2], SCALES[n // 2]
        alone = pipeline.generate(label, guidance_scale=scale, seed=n, output_type="codes", **settings)
        again = pipeline.generate(**out.prompts[n], seed=out.seeds[n], output_type="codes", **settings)
        assert torch.equal(out.codes[n], alone.codes[0]) and torch.equal(again.codes, alone.codes)
        assert out.prompts[n]["guidance_scale"] == scale
    changed = (out.codes != unguided.codes).flatten(1).any(1).tolist()
    assert not any(changed[2:4]) and any(changed)


def test_a_scale_in_all_places_of_a_list_is_this_scale(pipeline):
    asked = {"class_labels": LABELS, "seed": 0, "output_type": "codes"}
    assert torch.equal(
        pipeline.generate(**asked, guidance_scale=[2.0] * 4).codes, pipeline.generate(**asked, guidance_scale=2.0).codes
    )


def test_one_label_serves_all_scales(pipeline):
    one = pipeline.generate("3", guidance_scale=SCALES, seed=0, output_type="codes")
    same = pipeline.generate(["3"] * 4, guidance_scale=tuple(SCALES), seed=0, output_type="codes")
    assert torch.equal(one.codes, same.codes) and len(one) == 4 and one.prompts == same.prompts
    assert len(pipeline.generate(num_images=2, guidance_scale=[1.0, 1.0], output_type="codes")) == 2


def edits(pipeline, images, labels, scale, seed):
    mask = np.zeros((16, 16), bool)
    mask[4:, 3:12] = True
    asked = {"class_labels": labels, "guidance_scale": scale, "seed": seed, "output_type": "codes"}
    yield pipeline.inpaint(images, mask, **asked)
    yield pipeline.complete(images, rows=8, **asked)
    yield pipeline.outpaint(images, right=8, **asked)
    yield pipeline.vary(images, 0.5, **asked)


def test_edits_and_larger_images(pipeline):
    images = pipeline.generate(LABELS, seed=0).images
    larger = {"image_size": (16, 24), "output_type": "codes"}
    together = [*edits(pipeline, images, LABELS, SCALES, 5)]
    together.append(pipeline.generate(LABELS, guidance_scale=SCALES, seed=5, **larger))
    for n, scale in enumerate(SCALES):
        alone = [*edits(pipeline, images[n], LABELS[n], scale, 5 + n)]
        alone.append(pipeline.generate(LABELS[n], guidance_scale=scale, seed=5 + n, **larger))
        for all_of_them, single in zip(together, alone, strict=True):
            assert torch.equal(all_of_them.codes[n], single.codes[0])
            assert all_of_them.prompts[n]["guidance_scale"] == scale


WRONG = {
    "too few": ({"class_labels": [1, 2, 3], "guidance_scale": [2.0, 3.0]}, "received 2 values, but class_labels has 3"),
    "too many": ({"class_labels": [1], "guidance_scale": [2.0, 3.0]}, "received 2 values, but class_labels has 1"),
    "none": ({"class_labels": [1], "guidance_scale": []}, "received []; must be a number, a list with one for each"),
    "nested": ({"class_labels": [1], "guidance_scale": [[2.0]]}, "received [2.0]; allowed is a number"),
    "true": ({"class_labels": [1, 2], "guidance_scale": [2.0, True]}, "received True; allowed is a number"),
    "NaN": ({"class_labels": [1, 2], "guidance_scale": [2.0, float("nan")]}, "received nan; allowed is a number"),
    "text": ({"class_labels": [1, 2], "guidance_scale": [2.0, "3"]}, "received '3'; allowed is a number"),
    "no condition": ({"guidance_scale": [2.0, 1.0]}, "received (2.0, 1.0); guidance needs class_labels"),
    "not one each": ({"num_images": 3, "guidance_scale": [1.0, 1.0]}, "received a list of 2 for 3 images; needs one"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lists_are_refused(tiny_pipeline, case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError) as caught:
        tiny_pipeline.generate(**arguments)
    assert str(caught.value).startswith("guidance_scale: ") and message in str(caught.value)


def test_an_edit_takes_one_scale_for_each_image(tiny_pipeline):
    images = tiny_pipeline.generate([1, 2, 3], seed=0).images
    with pytest.raises(ValueError, match="guidance_scale: received 2 values for 3 images; needs one for all, or one"):
        tiny_pipeline.vary(images, class_labels=1, guidance_scale=[1.0, 2.0])
