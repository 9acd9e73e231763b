"""Priors whose classes are named conditions alone: labels, the best by class, and the commands generate and score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs import run
from pipelines.generate import GenerateConfig, generate
from pipelines.score import ScoreConfig, score
from tests.prompted import STYLES, make, make_parts, make_segments


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def segments(parts):
    return make_segments(parts)


@pytest.fixture(scope="module")
def styled(parts, segments):
    """One condition with classes, and texts."""
    return make(parts, [segments["style"], segments["caption"]])


@pytest.fixture(scope="module")
def several(parts, segments):
    """Two conditions with classes, and texts."""
    return make(parts, [segments[name] for name in ("animal", "style", "caption")])


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns its lines, or what it says when it refuses."""
    monkeypatch.chdir(tmp_path)

    def start(config, main, pipeline, *arguments):
        if not Path("pipeline").exists():
            pipeline.save_pretrained("pipeline")
        try:
            run(config, main, "command", ["pipeline", *arguments, "--device=cpu"])
        except SystemExit:
            return capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return start


def test_labels_are_those_of_the_conditions_with_classes(styled, several):
    asked = {"text": "a cat", "seed": 3, "output_type": "codes"}
    out = styled.generate(["drawn", 0], **asked)
    assert out.labels == ["drawn", "flat"] and "labels: drawn (1), flat (1)" in repr(out)
    again = styled.generate(out.labels[1], text="a cat", seed=out.seeds[1], output_type="codes")
    assert torch.equal(again.codes[0], out.codes[1])
    out = several.generate({"animal": "cat", "style": [2, 0]}, **asked)
    assert out.labels == [{"animal": "cat", "style": "shaded"}, {"animal": "cat", "style": "flat"}]
    assert "labels: cat · shaded (1), cat · flat (1)" in repr(out)
    again = several.generate(out.labels[1], text="a cat", seed=out.seeds[1], output_type="codes")
    assert torch.equal(again.codes[0], out.codes[1])
    assert several.generate({"style": 1}, **asked).labels == [{"style": "drawn"}]
    assert several.generate(**asked).labels is None


@pytest.mark.parametrize("name", ["one", "several"])
def test_the_best_by_the_class_of_a_named_condition(styled, several, name):
    others = {"text": "a red cat"} | ({"class_labels": {"animal": "bee"}} if name == "several" else {})
    pipeline, best_by = {"one": (styled, "class"), "several": (several, "style")}[name]
    asked = others | {"class_labels": others.get("class_labels", {}) | {"style": ["flat", "shaded"]}}
    out = pipeline.generate(**asked, seed=7, best_of=5, best_by=best_by, output_type="codes")
    assert out.seeds != [7, 8]
    posterior = pipeline.class_posterior(codes=out.codes, condition="style", **others)
    assert out.scores == pytest.approx([posterior[0, 0].log().item(), posterior[1, 2].log().item()], rel=1e-4)
    again = pipeline.generate(**asked, seed=out.seeds, output_type="codes")
    assert torch.equal(again.codes, out.codes)
    seen = []
    pipeline.generate(**asked, best_by=lambda images, labels: seen.extend(labels) or [0.0] * len(images))
    assert seen == out.labels


def test_the_best_by_class_needs_to_know_of_which_condition(styled, several):
    with pytest.raises(
        ValueError, match=r"best_by: received 'class'; must be one of .* with classes, 'animal', 'style'"
    ):
        several.generate({"style": 0}, best_of=2, best_by="class")
    with pytest.raises(ValueError, match=r"best_by: received 'animal'; needs class_labels\['animal'\]"):
        several.generate({"style": 0}, best_of=2, best_by="animal")
    with pytest.raises(ValueError, match="best_by: received 'caption'; allowed are 'likelihood', 'class', 'style'"):
        styled.generate(0, text="a cat", best_of=2, best_by="caption")


def test_the_seed_in_the_name_of_a_file_makes_its_image_again(command, styled):
    """Without best_of: its seed is that of the candidate that is kept."""
    asked = ["--class_labels=flat,shaded", "--text=a dog", "--guidance_scale.style=2", "--output_dir=out"]
    best = [*asked, "--seed=7", "--best_of=5", "--best_by=likelihood"]
    lines = command(GenerateConfig, generate, styled, *best)
    assert any(line["seed"] > 8 for line in lines)
    for style, line in zip(("flat", "shaded"), lines, strict=True):
        assert Path(line["file"]).stem == f"{style}_a_dog_{line['seed']:04d}"
        single = [f"--class_labels={style}", *asked[1:3], f"--seed={line['seed']}", "--output_dir=again"]
        (again,) = command(GenerateConfig, generate, styled, *single)
        assert Path(again["file"]).read_bytes() == Path(line["file"]).read_bytes()
    assert "output_dir: received 'out', which would replace" in command(GenerateConfig, generate, styled, *best)


@pytest.fixture
def image(command):
    """A file with an image."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)).save("image.png")
    return "image.png"


def test_the_command_score_takes_the_prompt_of_generate(command, styled, image):
    lines = command(ScoreConfig, score, styled, f"--images={image}", "--class_labels=drawn", "--text=a red dog")
    expected = styled.score(Image.open(image), "drawn", text="a red dog")
    best = styled.class_posterior(Image.open(image), text="a red dog")[0]
    assert lines == [
        {
            "file": image,
            "nats": pytest.approx(expected.nats.item(), abs=1e-3),
            "bits_per_pixel": pytest.approx(expected.bits_per_pixel.item(), abs=1e-4),
            "best_class": STYLES[best.argmax()],
            "probability": pytest.approx(best.max().item(), abs=1e-4),
        }
    ]


@pytest.mark.slow
def test_the_command_score_needs_to_know_of_which_condition(command, several, image):
    asked = [f"--images={image}", "--class_labels.animal=bee"]
    message = "best_class: received true; must be one of the conditions with classes, 'animal', 'style', or false"
    assert message in command(ScoreConfig, score, several, *asked)
    (line,) = command(ScoreConfig, score, several, *asked, "--best_class=style")
    posterior = several.class_posterior(Image.open(image), "style", class_labels={"animal": "bee"})
    assert line["best_class"] == STYLES[posterior.argmax()]
    (line,) = command(ScoreConfig, score, several, *asked, "--best_class=false")
    assert line.keys() == {"file", "nats", "bits_per_pixel"}
