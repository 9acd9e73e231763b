"""Best of several candidates, compared with a loop over single requests."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from configs import run
from configs.randomness import mix
from pipelines import VQGANPipeline
from pipelines.best_of import best_candidates, require_best_of
from pipelines.generate import GenerateConfig, generate
from stage2_prior import Segment
from tests.devices import DEVICE, EXACT_ON_CPU
from tests.slow import few

COUNT = 3


@pytest.fixture(scope="module")
def pipeline(tiny_runs) -> VQGANPipeline:
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def masked(masked_runs) -> VQGANPipeline:
    pipeline = VQGANPipeline.from_pretrained(masked_runs.pipeline, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def darkness(images, labels):
    """How dark images are: a score of users."""
    return [-float(np.asarray(image).mean()) for image in images]


def seeds_of(seed, count=COUNT):
    hashed = mix(mix(torch.tensor(seed)) ^ mix(torch.arange(1, count))) & (2**63 - 1)
    return [seed, *hashed.tolist()]


def score_of(pipeline, out, best_by, label):
    if best_by == "likelihood":
        return -pipeline.score(codes=out.codes, class_labels=label).nats.item()
    if best_by == "class":
        return pipeline.class_posterior(codes=out.codes)[0, label].log().item()
    return best_by(out.images, out.labels)[0]


def best_naively(pipeline, label, seed, best_by, **options):
    """The seed, the score and the codes of the best of single requests."""
    found = []
    for one in seeds_of(seed):
        out = pipeline.generate([label], seed=one, **options)
        found.append((score_of(pipeline, out, best_by, label), one, out.codes[0]))
    return max(found, key=lambda candidate: candidate[0])


@pytest.mark.parametrize(
    ("options", "best_by"),
    few(
        itertools.product([{}, {"guidance_scale": 2.0, "batch_size": 5}], ["likelihood", "class", darkness]),
        ({}, "class"),
        ({}, darkness),
        ({"guidance_scale": 2.0, "batch_size": 5}, "likelihood"),
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_best_is_that_of_a_loop_over_single_requests(pipeline, best_by, options):
    labels = [1, 7]
    out = pipeline.generate(labels, num_images_per_label=2, seed=10, best_of=COUNT, best_by=best_by, **options)
    assert out.labels == ["1", "1", "7", "7"] and len(out.images) == 4
    assert any(seed >= 14 for seed in out.seeds)  # not all first candidates are the best ones
    for n in range(4):
        score, seed, codes = best_naively(pipeline, labels[n // 2], 10 + n, best_by, **options)
        assert out.seeds[n] == seed and torch.equal(out.codes[n], codes)
        assert out.scores[n] == pytest.approx(score, rel=1e-4, abs=1e-5)
        again = pipeline.generate([labels[n // 2]], seed=out.seeds[n], **options)  # without best_of
        assert torch.equal(again.codes[0], codes) and again.scores is None
        alike = {"rtol": 0, "atol": 1} if EXACT_ON_CPU["atol"] == 0 else {"rtol": 0, "atol": 2}
        np.testing.assert_allclose(np.asarray(out.images[n], float), np.asarray(again.images[0], float), **alike)


def test_more_candidates_are_never_worse_and_one_is_the_plain_request(pipeline):
    asked = {"class_labels": [3, 5], "seed": 0, "output_type": "codes"}
    one, four, eight = (pipeline.generate(**asked, best_of=n, best_by="likelihood") for n in (1, 4, 8))
    plain = pipeline.generate(**asked)
    assert torch.equal(one.codes, plain.codes) and one.seeds == plain.seeds == [0, 1]
    assert all(a <= b <= c for a, b, c in zip(one.scores, four.scores, eight.scores, strict=True))
    assert one.scores != eight.scores


def test_greedy_candidates_are_equal(pipeline):
    out = pipeline.generate([3, 5], seed=0, temperature=0.0, best_of=COUNT, best_by="likelihood", output_type="codes")
    assert out.seeds == [0, 1]


def test_of_equal_candidates_the_first_is_chosen_though_scores_round():
    """Scores of equal codes may differ in the last digit, and a batch must not decide."""
    codes, scores = torch.tensor([[1], [1], [2], [3], [2], [3]]), torch.tensor([1.0, 1.0001, 0.5, 3.0, 4.0, 3.0001])
    best = best_candidates(codes.split(4), 3, lambda _, some: scores[some])
    assert (
        best.codes.tolist() == [[1], [2]]
        and best.numbers.tolist() == [0, 1]
        and best.scores.tolist() == pytest.approx([1.0, 4.0])
    )


def test_each_image_has_its_own_guidance_scale(pipeline):
    asked = {"class_labels": [3, 5], "seed": 0, "best_of": COUNT, "best_by": "class", "output_type": "codes"}
    out = pipeline.generate(**asked, guidance_scale=[1.0, 3.0])
    for n, scale in enumerate([1.0, 3.0]):
        alone = pipeline.generate(**asked | {"class_labels": [3, 5][n], "seed": n}, guidance_scale=scale)
        assert torch.equal(alone.codes[0], out.codes[n]) and alone.seeds == [out.seeds[n]]
    again = pipeline.generate(**out.prompts[1], seed=out.seeds[1], output_type="codes")
    assert torch.equal(again.codes[0], out.codes[1])


def test_a_function_sees_all_candidates_in_batches(pipeline):
    seen = []

    def score(images, labels):
        seen.append((len(images), list(labels)))
        return torch.zeros(len(images))

    out = pipeline.generate([3, 5], seed=0, best_of=3, best_by=score, batch_size=4)
    assert seen == [(3, ["3"] * 3), (3, ["5"] * 3)] and out.seeds == [0, 1] and out.scores == [0.0, 0.0]
    pipeline.generate(num_images=1, best_of=2, best_by=score)
    assert seen[2:] == [(2, [None, None])]


def test_larger_images(pipeline):
    asked = {"class_labels": [3, 5], "image_size": (16, 24), "seed": 0}
    out = pipeline.generate(**asked, best_of=3, best_by=darkness)
    for n in range(2):
        candidates = [
            pipeline.generate([3, 5][n], image_size=(16, 24), seed=seed, output_type="pil") for seed in seeds_of(n, 3)
        ]
        best = max(candidates, key=lambda one: darkness(one.images, None)[0])
        assert torch.equal(out.codes[n], best.codes[0]) and out.seeds[n] == best.seeds[0]


def test_a_masked_prior_takes_functions(masked):
    out = masked.generate([3, 5], seed=0, best_of=COUNT, best_by=darkness)
    for n, label in enumerate([3, 5]):
        _, seed, codes = best_naively(masked, label, n, darkness)
        assert out.seeds[n] == seed and torch.equal(out.codes[n], codes)


WRONG = {
    "no score": ({"best_of": 4}, "best_by: received None; best_of 4 needs 'likelihood', 'class' or"),
    "none": ({"best_of": 0, "best_by": "class"}, "best_of: received 0; must be a whole number from 1 to 1000"),
    "too many": ({"best_of": 1001, "best_by": "class"}, "best_of: received 1001; must be"),
    "true": ({"best_of": True, "best_by": "class"}, "best_of: received True; must be"),
    "unknown": ({"best_by": "beauty"}, "best_by: received 'beauty'; allowed are 'likelihood', 'class'"),
    "a number": ({"best_by": 3}, "best_by: received 3; allowed are"),
    "a function of nothing": ({"best_by": lambda: 0}, "must be a function of images and labels"),
    "larger": ({"best_by": "likelihood", "image_size": 32}, "best_by: received 'likelihood'; the prior has no"),
    "one score": (
        {"best_by": lambda *given: 1.0},
        "best_by: the function returned 1.0; it must return 2 finite numbers",
    ),
    "NaN": ({"best_by": lambda *given: [1.0, float("nan")]}, "best_by: the function returned [1.0, nan]; it must"),
    "truths": ({"best_by": lambda *given: [True, False]}, "best_by: the function returned [True, False]; it must"),
    "texts": ({"best_by": lambda *given: ["1", "2"]}, "best_by: the function returned ['1', '2']; it must"),
    "nothing": ({"best_by": lambda *given: None}, "best_by: the function returned None; it must"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(pipeline, case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError) as caught:
        pipeline.generate([1, 2], **arguments)
    assert message in str(caught.value)


def test_what_a_prior_cannot_score_is_refused(pipeline, masked):
    with pytest.raises(ValueError, match="best_by: received 'class'; needs class_labels"):
        pipeline.generate(num_images=2, best_by="class")
    style = Segment("style", "class", 2, class_names=("flat", "drawn"))
    styled = replace(pipeline.layout, class_names=(), class_counts=(), segments=(style,))
    assert require_best_of(styled, 2, "class", ["style"], is_larger=False) == 2  # the only one needs no name
    with pytest.raises(ValueError, match=r"best_by: received 'style'; needs class_labels$"):
        require_best_of(styled, 2, "style", [], is_larger=False)
    two = replace(styled, segments=(style, replace(style, name="group")))
    with pytest.raises(
        ValueError, match=r"best_by: received 'class'; must be one of the .* with classes, 'style', 'gr"
    ):
        require_best_of(two, 2, "class", ["style"], is_larger=False)
    with pytest.raises(ValueError, match="best_by: received 'class'; this prior has no classes"):
        require_best_of(replace(styled, segments=()), 2, "class", [], is_larger=False)
    for best_by in ("likelihood", "class"):
        with pytest.raises(ValueError, match=f"best_by: received '{best_by}'; this pipeline has a masked prior"):
            masked.generate([1], best_by=best_by)


def test_candidates_that_memory_cannot_hold_are_refused(pipeline, monkeypatch):
    monkeypatch.setattr("pipelines.best_of.shortage", lambda needed, device: f"needs {needed} bytes")
    with pytest.raises(ValueError, match="best_of: received 30 for 20 images; needs 24000 bytes; ask for fewer"):
        pipeline.generate(num_images=20, best_of=30, best_by=darkness)


def test_candidates_that_become_images_need_the_memory_of_images(pipeline, monkeypatch):
    seen = []
    monkeypatch.setattr("pipelines.pipeline_vqgan.require_memory", lambda *asked: seen.append((asked[2], asked[-1])))
    asked = {"image_size": (16, 24), "best_of": 2, "best_by": darkness, "output_type": "codes"}
    assert pipeline.generate(num_images=1, **asked).images is None and seen == [(2, "pil")]


def test_the_command(tiny_runs, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--class_labels=3,5", "--guidance_scale=[1.5, 3]", "--seed=0", "--output_dir=out", "--device=cpu"]
    arguments += ["--best_of=4", "--best_by=class"]
    run(GenerateConfig, generate, "command", [str(tiny_runs.pipeline), *arguments])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    out = pipeline.generate(["3", "5"], guidance_scale=[1.5, 3.0], seed=0, best_of=4, best_by="class")
    assert [line["seed"] for line in lines] == out.seeds and [line["guidance_scale"] for line in lines] == [1.5, 3.0]
    assert [line["score"] for line in lines] == pytest.approx(out.scores, rel=1e-4)
    for line, image in zip(lines, out.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(line["file"])), np.asarray(image))
