"""The choice of sampling settings: it finds settings that are better by construction, and keeps what is not beaten."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command, launch_command_parser

from configs import ConfigError, load_config
from configs.folder_lock import LOCK_NAME
from pipelines import VQGANPipeline
from pipelines.evaluation.metrics import area_features, frechet_distances
from pipelines.evaluation.run import LONGEST
from pipelines.tune import TuneConfig, tune
from pipelines.tuning import ranking
from pipelines.tuning.candidates import candidates
from pipelines.tuning.judge import Judge, Sample, gaussian
from pipelines.tuning.ranking import Figures, Gain, gain, is_better, ranked
from pipelines.tuning.search import Search
from stage1_vqgan.data.config import AugmentationConfig
from stage2_prior import TokenLayout
from tests import forks
from tests.devices import cpu_only
from tests.random_pipelines import random_pipeline
from tests.slow import few

# Only the standard value of each key is tried, unless a test says otherwise.
PINNED = {
    "guidance_scale": [1.0],
    "guidance_schedule": ["constant"],
    "temperature": [1.0],
    "top_k": [0],
    "top_p": [1.0],
    "min_p": [0.0],
}
MEASURE = {"num_samples": 160, "feature_size": 4, "num_components": 6}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """The bootstrap takes most of the time of a small search."""
    monkeypatch.setattr(ranking, "RESAMPLES", 40)


@pytest.fixture
def make(random_prior, tmp_path, datasets_cache):
    """Returns a function that saves a random pipeline, and images that it makes with some settings as real images."""

    def make(truth: dict, **changes) -> TuneConfig:
        pipeline = random_pipeline(random_prior)
        with torch.no_grad():  # surer of its codes, so that the settings matter more
            pipeline.prior.lm_head.weight *= 4
        pipeline.save_pretrained(tmp_path / "pipeline")
        for split, seed in (("train", 10_000), ("validation", 20_000)):
            out = pipeline.generate(pipeline.class_names, num_images_per_label=60, seed=seed, **truth)
            for number, (image, label) in enumerate(zip(out.images, out.labels, strict=True)):
                path = tmp_path / "images" / split / label / f"{number:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
        values = {
            "pipeline": str(tmp_path / "pipeline"),
            "data": {"dataset": str(tmp_path / "images"), "validation_split": "validation"},
            **PINNED,
            **MEASURE,
            **changes,
        }
        return load_config(TuneConfig, overrides=values)

    return make


def lock_of(config):
    return Path(config.pipeline, LOCK_NAME)


def defaults_of(config):
    return dict(VQGANPipeline.from_pretrained(config.pipeline).sampling_defaults)


TRUE = {
    "temperature": ({"temperature": 0.5}, {"temperature": [0.25, 0.5, 1.0, 2.0], "top_k": [0, 2]}),
    "guidance": ({"guidance_scale": 3.0}, {"guidance_scale": [1.0, 3.0, 9.0]}),
}


@pytest.mark.parametrize("case", few(TRUE, "guidance"))
def test_the_search_finds_settings_that_are_truly_better(make, capsys, case):
    truth, values = TRUE[case]
    config = make(truth, **values)
    found = tune(config)
    assert found["settings"] == truth == defaults_of(config)
    printed = capsys.readouterr().out
    assert "standard values (present)" in printed and "these are now the defaults of" in printed
    card = Path(config.pipeline, "README.md").read_text()
    (name, value), *_ = truth.items()
    assert f"| now: {name} {value:g} | " in card and "| before: standard values | " in card
    before, now = found["rounds"][-1]["figures"][-1], found["rounds"][-1]["figures"][0]
    assert f"| {now['distance']:.4g} | {now['accuracy']:.4g} |" in card and now["distance"] < before["distance"]
    assert json.loads(Path(config.folder, "tuning.json").read_text()) == json.loads(json.dumps(found))

    if case != "temperature":
        return
    # once more, from the settings that are now the present ones: nothing beats them
    again = tune(replace(config, output_dir=f"{config.pipeline}_again"))
    assert again["settings"] == truth == again["present"] == defaults_of(config)


class Rigged:
    """Stands for a judge. The images are nearest to real ones at one order temperature and guidance scale."""

    real_accuracy, inputs = 0.97, "weights and images"
    real = [np.random.default_rng(half).normal(size=(180, 4)) for half in (0, 1)]

    def sample(self, settings, half, count, seed):
        rng = np.random.default_rng(seed)
        far = abs(np.log2(settings.get("order_temperature", 4.5) / 20)) + abs(settings.get("guidance_scale", 1) - 1.5)
        components = rng.normal(size=(count, 4)) * (1 + 0.2 * far)
        return Sample(components, rng.random(count) < (0.95 if "guidance_scale" in settings else 0.9))


def test_the_best_order_temperature_of_a_masked_prior_is_found(tmp_path):
    values = PINNED | {
        "guidance_scale": None,
        "guidance_schedule": None,
        "output_dir": str(tmp_path),
        "num_samples": 800,
    }
    config = TuneConfig(pipeline="x", data={"dataset": "digits"}, **values)
    tried = candidates(config, layout_of(family="masked"), {})
    search = Search(config, Rigged())
    winner = search.winner(search.run(tried)[-1], {})
    near = [one for one in tried if one.get("order_temperature") == 20]
    assert len(tried) == 49 and len(near) < 15 and winner in near and winner["guidance_scale"] in (1.25, 1.5, 2.0)


@pytest.mark.slow
def test_weights_that_are_replaced_during_a_search_keep_their_defaults(make, monkeypatch):
    config = make({"temperature": 0.5}, temperature=[0.5, 1.0])
    search = Search.run

    def replaced_meanwhile(self, tried):
        other = VQGANPipeline.from_pretrained(config.pipeline)
        other.prior.lm_head.weight.data += 1
        other.save_pretrained(config.pipeline)
        return search(self, tried)

    monkeypatch.setattr(Search, "run", replaced_meanwhile)
    with pytest.raises(ConfigError, match="whose weights were replaced during the search; search again"):
        tune(config)
    assert defaults_of(config) == {}


@pytest.mark.slow
def test_a_search_that_was_killed_before_it_wrote_the_card_is_mended_by_the_next(make, monkeypatch):
    config = make({"temperature": 0.5}, temperature=[0.5, 1.0])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("pipelines.tuning.report.write_card", lambda *_: exec("raise KeyboardInterrupt"))
        tune(config)
    card = Path(config.pipeline, "README.md")
    assert defaults_of(config) == {"temperature": 0.5} and "temperature 0.5" not in card.read_text()
    assert tune(config)["settings"] == {"temperature": 0.5}
    assert "| now: temperature 0.5 | " in card.read_text() and "| before: standard values | " in card.read_text()
    assert "left out: temperature 0.5." in card.read_text() and "guidance_scale=" not in card.read_text()


@pytest.mark.slow
def test_the_present_settings_stay_if_nothing_is_better(make, capsys):
    """Images of the standard settings, and others that are the same or worse."""
    values = {"temperature": [0.3, 1.0], "top_p": [0.999999, 1.0], "min_p": [1e-9, 0.0], "top_k": [0, 31, 32]}
    config = make({}, **values)
    before = {path: path.read_bytes() for path in Path(config.pipeline).rglob("*.*")} | {lock_of(config): b""}
    assert tune(config)["settings"] == {}
    assert (
        "no setting is better than the present one beyond the noise; it stays: standard values"
        in capsys.readouterr().out
    )
    assert {path: path.read_bytes() for path in Path(config.pipeline).rglob("*.*")} == before


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    """What was tried is not tried again. A file that is damaged is, and so is all for another seed or other images."""
    config = TuneConfig(
        pipeline="x", data={"dataset": "digits"}, output_dir=str(tmp_path / "a"), num_candidates=6, num_samples=40
    )
    tried, sample, seen = candidates(config, layout_of(), {}), Rigged.sample, []
    straight = Search(replace(config, output_dir=str(tmp_path / "b")), Rigged()).run(tried)

    def interrupted(self, *args):
        seen.append(json.dumps(args))
        if len(seen) == 9:
            raise KeyboardInterrupt
        return sample(self, *args)

    monkeypatch.setattr(Rigged, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Search(config, Rigged()).run(tried)
    files = sorted((tmp_path / "a" / "tried").iterdir())
    assert len(files) == 8 and {path.suffix for path in files} == {".npz"}
    files[0].write_bytes(files[0].read_bytes()[:50])
    assert Search(config, Rigged()).run(tried) == straight
    total = 7 + 4 + 4
    rounds = {tuple(json.loads(one)[1:]) for one in seen}
    assert rounds == {(0, 10, 0), (0, 40, 0), (1, 40, 1)}  # the other half, with other seeds, confirms
    assert len(seen) == total + 2 and len(set(seen)) == total  # the interrupted one, and that of the damaged file
    assert Search(config, Rigged()).run(tried) == straight and len(seen) == total + 2
    Search(replace(config, seed=1), Rigged()).run(tried)
    assert len(seen) == 2 * total + 2
    monkeypatch.setattr(Rigged, "inputs", "others")
    Search(config, Rigged()).run(tried)
    assert len(seen) == 3 * total + 2


@pytest.mark.slow
def test_another_classifier_gives_other_samples(make):
    """The classifier "resnet" sees mirrored images if the augmentation mirrors."""
    config = make({})
    pipeline = VQGANPipeline.from_pretrained(config.pipeline)
    mirroring = replace(config, data=replace(config.data, augmentation=AugmentationConfig(horizontal_flip=True)))
    first, again, other = (Judge(one, pipeline).inputs for one in (config, config, mirroring))
    assert first == again != other


def test_processes_wait_for_each_other(make, monkeypatch):
    """One process may sample for hours while another one finds its samples in files. The launcher may ask for CPUs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    asked = {}

    def state(**options):
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.tuning.run.PartialState", state)
    with pytest.raises(KeyboardInterrupt):
        tune(make({}))
    assert asked == {"cpu": True, "timeout": LONGEST}


def test_the_figures_are_those_of_an_evaluation(make):
    config = make({})
    pipeline = VQGANPipeline.from_pretrained(config.pipeline)
    judge = Judge(config, pipeline)
    sample = judge.sample({"temperature": 0.7}, 1, 30, seed=3)
    labels = judge.validation.labels[1::2][np.arange(30) * 90 // 30].tolist()
    seeds = torch.randint(2**63 - 1, (30,), generator=torch.Generator().manual_seed(3)).tolist()
    images = pipeline.generate(labels, seed=seeds, temperature=0.7, output_type="pt").images * 2 - 1
    train, generated, real = (
        area_features(pixels, 4) for pixels in (judge.train.pixels(), images, judge.validation.pixels()[1::2])
    )
    (expected,) = frechet_distances(train, real, [generated], 6)
    (classifier, _), *others = judge._classifiers.values()
    assert not others and sample.accuracy == (classifier.predict(images) == labels).mean() > 0.34
    assert gain(sample, sample, judge.real[1]) == Gain(0.0, 0.0, 0.0, 0.0)
    assert Figures.of(sample, gaussian(judge.real[1])).distance == pytest.approx(expected, rel=1e-4)


def layout_of(**fields):
    return TokenLayout(32, ("ant", "bee"), (4, 4), 4, "0123456789abcdef", **fields)


def test_candidates():
    layout = layout_of()
    config = TuneConfig(pipeline="x", data={"dataset": "digits"})
    present = {"guidance_interval": (0.0, 0.5), "guidance_scale": 1.1}
    found = candidates(replace(config, num_candidates=10**6), layout, present)
    assert found[0] == present and len(found) == 1 + (1 + 4 * 3) * (1 + 4 + 1 + 3 + 3)  # top_k from 32 up is all codes
    assert len({json.dumps(one) for one in found}) == len(found)
    assert all(len(one.keys() & {"temperature", "top_k", "top_p", "min_p"}) <= 1 for one in found)
    assert all(("guidance_interval" in one) == ("guidance_scale" in one) for one in found)
    some = candidates(config, layout, present)
    assert (
        len(some) == 49
        and some[0] == present
        and [one for one in found if one in some]
        and some == candidates(config, layout, present)
    )
    assert candidates(replace(config, seed=1), layout, present) != some
    assert not any("guidance_scale" in one for one in candidates(config, layout_of(has_null=False), {}))
    masked = candidates(replace(config, num_candidates=10**6), replace(layout, family="masked"), {"order": "halton"})
    assert {one.get("num_steps") for one in masked} == {8, 16, None} and not any(
        "order_temperature" in one for one in masked
    )


REFUSED = {
    "steps": ({"num_steps": [4]}, {}, r"num_steps: received \[4\]; this prior is causal; leave it out"),
    "guidance": ({"guidance_scale": [2.0]}, {"has_null": False}, "guidance_scale: received .*; guidance needs a prior"),
    "many steps": ({"num_steps": [4, 17]}, {"family": "masked"}, "num_steps: received .*; an image has 16 codes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_the_prior_cannot_use_are_refused(case):
    values, fields, words = REFUSED[case]
    layout = replace(layout_of(), **fields)
    with pytest.raises(ConfigError, match=words):
        candidates(TuneConfig(pipeline="x", data={"dataset": "digits"}, **values), layout, {})


def test_what_cannot_be_tuned_is_refused(make, tmp_path):
    config = make({})
    with pytest.raises(ConfigError, match="pipeline: received 'me/mine'; there is no such folder to save"):
        tune(replace(config, pipeline="me/mine", output_dir=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=r"num_components: received 200; at most 16 with these images"):
        tune(replace(config, num_components=200))
    for label in ("ant", "bee", "cat"):
        for number in range(2, 80):
            for path in Path(config.data.dataset, "validation", label).glob("*.png"):
                if int(path.stem) % 80 == number:
                    path.unlink()
    with pytest.raises(ConfigError, match="num_components: received 6, which needs 14 validation images"):
        tune(config)
    pipeline = VQGANPipeline.from_pretrained(config.pipeline)
    pipeline.layout = replace(pipeline.layout, class_names=("ant",))
    with pytest.raises(ConfigError, match=r"data\.dataset: received .*, which has the classes ant, bee, cat, but the"):
        Judge(config, pipeline)
    data = replace(config.data, dataset="digits", validation_split=None)
    with pytest.raises(ConfigError, match=r"data\.dataset: received 'digits', which has the classes 0, 1"):
        tune(replace(config, data=data))


@pytest.mark.slow
def test_a_pipeline_without_classes(make):
    """Images without labels: only their distance counts."""
    config = make({"temperature": 0.5}, temperature=[0.5, 1.0])
    data = replace(config.data, use_labels=False)
    assert tune(replace(config, data=data))["settings"] == {"temperature": 0.5}
    assert "class_accuracy" not in Path(config.pipeline, "README.md").read_text()


# ---------------------------------------------------------------------- the rule


def test_the_rule():
    """The smallest distance; at an equal one the accuracy, up to that of real images; never one below the present."""
    others = [(0.42, 0.98), (0.41, 0.95), (0.40, 0.92), (0.43, 0.999), (0.30, 0.80), (0.435, 1.0), (0.425, 0.975)]
    figures = [Figures(*one) for one in [(0.50, 0.90), *others]]
    assert ranked(figures, 0.031, 1000, 0.97) == [1, 7, 4, 2, 3, 6, 0, 5]
    assert ranked(figures, 0.009, 1000, 0.97) == [3, 2, 1, 7, 4, 6, 0, 5]
    assert ranked(figures, 0.031, 1000, 1.0) == [4, 1, 7, 2, 3, 6, 0, 5]
    assert ranked([Figures(0.5, None), Figures(0.4, None), Figures(0.39, None)], 0.03, 1000, None) == [2, 1, 0]


BETTER = {
    "clearer": (Gain(0.01, 0.02, 0.03, 0.01), 0.90, True),
    "nearer": (Gain(-0.05, 0.02, -0.01, 0.01), 0.90, True),
    "within the noise": (Gain(-0.03, 0.02, 0.015, 0.01), 0.90, False),
    "clearer, but further": (Gain(0.05, 0.02, 0.05, 0.01), 0.90, False),
    "nearer, but less clear": (Gain(-0.05, 0.02, -0.03, 0.01), 0.90, False),
    "clearer than real images": (Gain(0.0, 0.02, 0.03, 0.01), 0.98, False),
    "the same": (Gain(0.0, 0.0, 0.0, 0.0), 0.90, False),
}


@pytest.mark.parametrize("case", BETTER)
def test_better_is_beyond_the_noise(case):
    change, accuracy, expected = BETTER[case]
    assert is_better(change, Figures(0.5, accuracy), 0.97) is expected
    without = replace(change, accuracy=0.0, accuracy_error=0.0)
    assert is_better(without, Figures(0.5, None), None) is (case.startswith("nearer"))


@pytest.mark.slow
def test_the_standard_error_is_that_of_repetitions():
    """The spread of the difference over new images and new real images, against the bootstrap of one of them."""
    rng = np.random.default_rng(0)

    def draw():
        shared = rng.normal(size=(400, 3))  # images with the same seeds
        noise = rng.normal(size=(400, 3))
        right = rng.random(400)
        return (
            Sample(0.8 * shared + 0.6 * noise, right < 0.9),
            Sample(1.3 * shared, right < 0.85),
            rng.normal(size=(150, 3)),
        )

    changes = [gain(*draw()) for _ in range(25)]
    for name in ("distance", "accuracy"):
        spread = np.std([getattr(change, name) for change in changes])
        assert np.mean([getattr(change, f"{name}_error") for change in changes]) == pytest.approx(spread, rel=0.35)


# ---------------------------------------------------------------------- processes


def search_with_another_classifier(folder):
    """The classifier of each process has another accuracy."""
    rank = PartialState(cpu=True).process_index
    judge = type("", (Rigged,), {"real_accuracy": (0.97, 0.5)[rank]})()
    values = PINNED | {"guidance_scale": None, "output_dir": str(folder), "num_samples": 80}
    config = TuneConfig(pipeline="x", data={"dataset": "digits"}, **values)
    found = Search(config, judge).run(candidates(config, layout_of(family="masked"), {}))
    Path(folder, f"{rank}.json").write_text(json.dumps([one.settings for one in found]))


@cpu_only
def test_processes_agree_although_their_classifiers_differ(tmp_path):
    forks.launch_two(search_with_another_classifier, (str(tmp_path),), {})
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()


@pytest.mark.slow
def test_two_processes_find_the_same(make, monkeypatch, capfd):
    monkeypatch.setattr(ranking, "RESAMPLES", 200)  # as many resamples as in the other processes
    config = make({"temperature": 0.5}, temperature=[0.5, 1.0, 2.0])
    copy = shutil.copytree(config.pipeline, f"{config.pipeline}_copy")
    alone = tune(replace(config, pipeline=str(copy)))
    keys = {name: getattr(config, name) for name in [*PINNED, *MEASURE]} | {"data.dataset": config.data.dataset}
    words = [word for key, value in keys.items() for word in (f"--{key}", json.dumps(value))]
    options = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no -m pipelines.tune"
    command = [*options.split(), config.pipeline, "--data.validation_split", "validation", *words]
    monkeypatch.setattr(sys, "argv", ["accelerate"])
    launch_command(launch_command_parser().parse_args(command))
    assert json.loads(Path(config.folder, "tuning.json").read_text()) == json.loads(json.dumps(alone))
    assert defaults_of(config) == alone["settings"] == {"temperature": 0.5}
    assert capfd.readouterr().out.count("round 1:") == 2  # once here, once by the first process
