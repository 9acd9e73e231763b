"""A prior with several conditions is evaluated with the conditions of the validation images of its code store."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError
from pipelines import VQGANPipeline
from pipelines.evaluation.conditions import real_labels
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.generated import generate_samples
from pipelines.evaluation.generation_config import GenerationMetricsConfig
from pipelines.evaluation.measuring import measure
from pipelines.evaluation.prompts import chosen_rows
from pipelines.evaluation.reading import PixelImages
from pipelines.evaluation.run import evaluate, read_splits
from pipelines.model_card import meanings_of
from pipelines.tuning.config import TuneConfig
from pipelines.tuning.judge import Judge
from stage1_vqgan import DataConfig, SkippedImage, VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import Segment, TokenLayout
from stage2_prior.code_store import shard_path
from stage2_prior.manifest import write_manifest
from stage2_prior.prior import build_prior
from stage2_prior.shards import read_notes, write_shard
from tests import tiny
from tests.code_stores import ORIGIN

PRIORS = tiny.RANDOM_PRIORS | tiny.MASKED_PRIORS
STYLE = Segment("style", "class", 4, class_names=("flat", "drawn", "shaded", "dark"))
LABELS, STYLES = np.array([1, 0, 1, 1, 0, 1]), np.array([0, 1, 2, 3, 0, 1])


def make(prior="llama", **changes):
    torch.manual_seed(0)
    vqgan = VQGANModel(VQGANConfig(**tiny.VQGAN))
    vqgan.config.fingerprint = vqgan.compute_fingerprint()
    layout = TokenLayout(32, ("ant", "bee"), (4, 4), 4, vqgan.config.fingerprint, segments=(STYLE,))
    layout = dataclasses.replace(layout, **changes)
    made = VQGANPipeline(vqgan, build_prior(PRIORS[prior], layout), VQGANImageProcessor(16, 1), layout)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipeline():
    return make()


def write_store(folder, layout, column="style", styles=STYLES, skipped=()):
    """A store of an image for each style in both splits, all of the same codes, and of skipped images."""
    folder.mkdir(exist_ok=True)
    labels = LABELS if layout.num_classes else None
    notes = {}
    for split in ("train", "validation"):
        codes, images = np.zeros((len(styles), 16), np.uint16), len(styles) + len(skipped)
        write_shard(shard_path(folder, split, 0), codes, labels, images, skipped, conditions=styles[:, None])
        notes[split] = [read_notes(shard_path(folder, split, 0))]
    conditions = {"conditions": {one.name: {"kind": "class", "column": column} for one in layout.segments}}
    origin = ORIGIN | conditions | {"tokenizer_fingerprint": layout.tokenizer_fingerprint}
    write_manifest(folder, layout, notes, origin, 1.0)


def config_of(folder, **values):
    store = {"code_store": str(folder), "samples_per_class": 2, "guidance_scale": 2.0, **values}
    return EvaluationConfig(pipeline="p", data=DataConfig(dataset="digits"), output_dir=str(folder), **store)


def in_bytes(images):
    """Images in [0, 1] as pixels in [-1, 1], each one of 256 values."""
    return (images * 255).round() / 127.5 - 1


def test_images_are_asked_for_with_the_conditions_of_validation_images(pipeline, tmp_path):
    write_store(tmp_path, pipeline.layout)
    pixels, labels = generate_samples(config_of(tmp_path), pipeline)
    assert {name: found.tolist() for name, found in labels.items()} == {"class": [0, 0, 1, 1], "style": [1, 0, 0, 3]}
    seeds = torch.randint(2**63 - 1, (4,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = {"class_labels": {"class": ["ant", "ant", "bee", "bee"], "style": ["drawn", "flat", "flat", "dark"]}}
    expected = pipeline.generate(**asked, guidance_scale=2.0, seed=seeds, output_type="pt").images
    assert torch.equal(pixels, in_bytes(expected))


def test_a_masked_prior_takes_the_steps_of_the_settings(tmp_path):
    pipeline = make("bert", family="masked")
    write_store(tmp_path, dataclasses.replace(pipeline.layout, family="causal"))
    steps = {"num_steps": 3, "order": "halton"}
    pixels, _ = generate_samples(config_of(tmp_path, **steps), pipeline)
    seeds = torch.randint(2**63 - 1, (4,), generator=torch.Generator().manual_seed(0)).tolist()
    asked = {"class_labels": {"class": ["ant", "ant", "bee", "bee"], "style": ["drawn", "flat", "flat", "dark"]}}
    expected = pipeline.generate(**asked, guidance_scale=2.0, seed=seeds, output_type="pt", **steps).images
    assert torch.equal(pixels, in_bytes(expected))
    with pytest.raises(ConfigError, match="num_steps: received 3; this prior is causal"):
        generate_samples(config_of(tmp_path, **steps), make())


def brightness_of(style, noise):
    """A gray image whose brightness tells its style."""
    return Image.fromarray(np.full((16, 16), 40 + 50 * style + noise, np.uint8))


def write_images(folder, **columns):
    """40 images in each split, ten of each style; the brightness of an image tells its style."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        styles = [number % 4 for number in range(40)]
        images = [brightness_of(style, rng.integers(20)) for style in styles]
        names = [STYLE.class_names[style] for style in styles]
        features = datasets.Features(image=datasets.Image(), style=datasets.ClassLabel(names=list(STYLE.class_names)))
        rows = {"image": images, "style": names} | columns
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def evaluation(folder, pipeline, **values):
    """The real images and their classes, for an evaluation of a pipeline."""
    data = DataConfig(dataset=str(folder / "data"), validation_split="validation", use_labels=False)
    config = dataclasses.replace(config_of(folder / "store", feature_size=4, num_components=2, **values), data=data)
    train, validation = read_splits(config, pipeline)
    return config, train, validation, real_labels(config, pipeline.layout, train, validation)


def test_a_condition_with_classes_has_an_accuracy(tmp_path, quiet):
    pipeline = make(class_names=())
    write_images(tmp_path / "data")
    write_store(tmp_path / "store", pipeline.layout)
    config, train, validation, real = evaluation(tmp_path, pipeline, max_real_images=24)
    assert real.keys() == {"style"} and len(train) == 24
    for images, labels in zip((train, validation), real["style"], strict=True):
        levels = (images.pixels().mean((1, 2, 3)) + 1) * 127.5
        assert labels.tolist() == ((levels - 35) // 50).int().tolist()
    asked = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0])
    right = (asked[:, None, None, None] * 50.0 + 50).expand(-1, 1, 16, 16) / 127.5 - 1
    for labels, share in ((asked, 1.0), (asked.roll(2), 0.0), (asked.where(asked > 0, 3), 0.75)):
        metrics = measure(config, pipeline, train, validation, real, PixelImages(right), {"style": labels.numpy()})
        assert metrics["class_accuracy_style"] == share and metrics["class_accuracy_style_real"] == 1.0
        beside = {"n": 8, "images": "generated", "reference": "24 training images"}
        assert metrics["details"]["class_accuracy_style"].items() >= beside.items()
        assert not metrics.keys() & {"class_accuracy", "class_accuracy_real", "classification_accuracy_score"}
    found = meanings_of(metrics)
    assert found["class_accuracy_style"] == "as `class_accuracy`, of the classes of this condition"
    assert found["class_accuracy_style_real"] == "the same for real images"


@pytest.fixture
def tuned(tmp_path, quiet):
    """A pipeline, and a function that returns a judge of it. The store skips image 5 of 40."""
    pipeline, styles = make(class_names=()), np.delete(np.arange(40) % 4, 5)
    write_images(tmp_path / "data")
    write_store(tmp_path / "store", pipeline.layout, styles=styles, skipped=[SkippedImage(5, "5", "damaged")])
    data = DataConfig(dataset=str(tmp_path / "data"), validation_split="validation", use_labels=False)

    def judge(**values):
        measured = {"code_store": str(tmp_path / "store"), "feature_size": 4, "num_components": 2, **values}
        return Judge(TuneConfig(pipeline="p", data=data, **measured), pipeline)

    return pipeline, judge


def test_settings_are_tuned_with_the_conditions_of_validation_images(tuned, tmp_path):
    pipeline, judge_with = tuned
    judge = judge_with()
    assert judge.inputs == judge_with().inputs
    found = judge.sample({"guidance_scale": 2.0, "top_k": 9}, half=1, count=6, seed=3)
    seeds = torch.randint(2**63 - 1, (6,), generator=torch.Generator().manual_seed(3)).tolist()
    styles = (np.delete(np.arange(1, 40, 2), 2) % 4)[np.arange(6) * 19 // 6].tolist()  # of the odd images without 5
    asked = {"class_labels": styles, "guidance_scale": 2.0, "top_k": 9}
    images = pipeline.generate(**asked, seed=seeds, output_type="pt").images * 2 - 1
    assert np.allclose(found.components, judge._components(images))
    levels = ((images.mean((1, 2, 3)) + 1) * 127.5).numpy()
    assert (found.right == (abs(levels - 50 - 50 * np.array(styles)) <= 25)).all()
    assert judge.real_accuracy == 1.0
    write_store(tmp_path / "store", pipeline.layout, styles=np.arange(40) % 3)
    assert judge.inputs != judge_with().inputs
    write_store(tmp_path / "store", pipeline.layout)
    with pytest.raises(
        ConfigError, match=r"code_store: received .*, made of 6 validation images; data\.dataset has 40"
    ):
        judge_with().sample({}, 0, 6, 0)
    with pytest.raises(ConfigError, match="code_store: this prior has further conditions"):
        judge_with(code_store=None).sample({}, 0, 6, 0)


@pytest.mark.parametrize("most", [40, 13, 8])
def test_both_halves_hold_the_same_images_as_their_prompts(tuned, most):
    """Also if only some of the validation images are read. The prompt has the style that the brightness tells."""
    pipeline, judge_with = tuned
    judge = judge_with(max_real_images=most)
    numbers = np.linspace(0, 39, most).astype(int)
    for half in (0, 1):
        shown = numbers[half::2][numbers[half::2] != 5]
        prompts = judge._prompts(half, len(shown))[:, pipeline.layout.places["style"]]
        levels = (judge.validation.pixels()[half::2].mean((1, 2, 3)) + 1) * 127.5
        styles = ((levels - 35) // 50).long()[torch.from_numpy(numbers[half::2] != 5)]
        assert (
            (prompts[:, 0] - pipeline.layout.first_tokens["style"]).tolist() == styles.tolist() == (shown % 4).tolist()
        )


def test_a_code_store_that_was_written_anew_is_evaluated_anew(tmp_path, quiet):
    pipeline = make(class_names=())
    pipeline.save_pretrained(tmp_path / "pipeline")
    write_images(tmp_path / "data")
    data = DataConfig(dataset=str(tmp_path / "data"), validation_split="validation", use_labels=False)
    measured = {"feature_size": 4, "num_components": 2, "metrics": GenerationMetricsConfig(feature_networks=[])}
    values = {"pipeline": str(tmp_path / "pipeline"), "data": data, "output_dir": str(tmp_path / "out"), **measured}
    found = []
    for styles in (STYLES, STYLES[::-1] % 2):
        write_store(tmp_path / "store", pipeline.layout, styles=styles)
        found.append(evaluate(dataclasses.replace(config_of(tmp_path / "store"), samples_per_class=6, **values)))
    assert found[0]["class_accuracy_style"] != found[1]["class_accuracy_style"]
    assert Image.open(tmp_path / "out" / "samples.png").height == 2 * 50 + 2  # two prompts


def test_other_columns_and_other_classes(tmp_path, quiet, capsys):
    pipeline = make(class_names=())
    write_images(tmp_path / "data")
    write_store(tmp_path / "store", pipeline.layout, "kind")
    assert evaluation(tmp_path, pipeline)[-1] == {}
    assert "no accuracy of style: received 'kind'; the columns are" in capsys.readouterr().out
    other = make(class_names=(), segments=(dataclasses.replace(STYLE, class_names=("a", "b", "c", "d")),))
    write_store(tmp_path / "store", other.layout)
    with pytest.raises(
        ConfigError, match=r"data\.dataset: its column 'style' has the classes flat, drawn, .* a, b, c, d"
    ):
        evaluation(tmp_path, other)


def test_what_cannot_be_evaluated_is_refused(pipeline, tmp_path):
    write_store(tmp_path, pipeline.layout)
    with pytest.raises(ConfigError, match=r"code_store: this prior has further conditions \(style\); give the code"):
        generate_samples(config_of(tmp_path, code_store=None), pipeline)
    other = dataclasses.replace(pipeline.layout, segments=(dataclasses.replace(STYLE, name="kind"),))
    write_store(tmp_path / "other", other)
    with pytest.raises(ConfigError, match=r"code_store: received .*; give the store that it was trained on"):
        generate_samples(config_of(tmp_path, code_store=str(tmp_path / "other")), pipeline)


def test_rows_are_spread_over_each_class():
    assert chosen_rows(None, 6, 0, 3).tolist() == [0, 2, 4]
    assert chosen_rows(LABELS, 6, 2, 5).tolist() == [1, 1, 1, 4, 4, 0, 0, 2, 3, 5]
    with pytest.raises(ConfigError, match="no image of class 2"):
        chosen_rows(LABELS, 6, 3, 1)
