"""The commands generate and reconstruct: their files, their lines, and mistakes that end in a message."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from configs import run
from pipelines.command_prompts import asked_labels
from pipelines.generate import GenerateConfig, file_names, generate
from pipelines.reconstruct import ReconstructConfig, image_files, reconstruct
from stage1_vqgan import labelled_grid
from stage1_vqgan.reconstruction import evaluate_reconstruction
from tests.devices import DEVICE


@pytest.fixture
def images(tmp_path) -> Path:
    """Four digits in class folders, and a file that is no image."""
    for number, digit in enumerate(load_digits().images[:4]):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8)).save(path)
    (tmp_path / "images" / "b" / "broken.jpg").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def command(tiny_runs, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns its lines, or what it says when it refuses."""
    monkeypatch.chdir(tmp_path)

    def start(config_class, main, *arguments):
        try:
            run(config_class, main, "command", [*arguments, f"--device={DEVICE}"])
        except SystemExit as exited:
            assert exited.code == 2
            return capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return start


def test_generate_writes_images_a_grid_and_lines(command, tiny_runs, tiny_pipeline):
    options = ["--num_images_per_label=2", "--seed=5", "--guidance_scale=2"]
    options += ["--class_labels=3,7", "--output_dir=out", "--grid=grids/all.png"]
    lines = command(GenerateConfig, generate, str(tiny_runs.pipeline), *options)
    expected = tiny_pipeline.generate(["3", 7], num_images_per_label=2, guidance_scale=2.0, seed=5)
    assert [(line["label"], line["seed"]) for line in lines] == list(zip(expected.labels, expected.seeds, strict=True))
    assert [line["file"] for line in lines] == [f"out/{name}.png" for name in ("3_0005", "3_0006", "7_0007", "7_0008")]
    assert {line["guidance_scale"] for line in lines} == {2.0} and lines[0]["top_p"] == 1.0
    for line, image in zip(lines, expected.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(line["file"])), np.asarray(image))
    grid = labelled_grid([("3", expected.images[:2]), ("7", expected.images[2:])])
    assert np.array_equal(np.asarray(Image.open("grids/all.png")), np.asarray(grid))

    # a line is enough to make its image again
    (again,) = command(
        GenerateConfig,
        generate,
        str(tiny_runs.pipeline),
        f"--class_labels={lines[2]['label']}",
        f"--seed={lines[2]['seed']}",
        "--guidance_scale=2",
        "--output_dir=again",
    )
    assert Path(again["file"]).read_bytes() == Path(lines[2]["file"]).read_bytes()


def test_generate_replaces_no_file_without_being_told(command, tiny_runs):
    options = [str(tiny_runs.pipeline), "--num_images=2", "--seed=1"]
    Path("out").mkdir()
    Path("out/image_0002.png").write_text("mine")
    Path("mine.png").write_text("mine")
    refused = command(GenerateConfig, generate, *options, "--output_dir=out")
    assert "output_dir: received 'out', which would replace image_0002.png" in refused and "--overwrite" in refused
    assert "grid: received 'mine.png'" in command(GenerateConfig, generate, *options, "--grid=mine.png")
    assert Path("mine.png").read_text() == Path("out/image_0002.png").read_text() == "mine"
    lines = command(GenerateConfig, generate, *options, "--grid=mine.png", "--overwrite=true")
    assert [(line["file"], line["label"]) for line in lines] == [("mine.png", None)] * 2
    assert Image.open("mine.png").size == (2 * 66 + 2, 66 + 2)  # no class, so no margin with labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid=a.jpg"], "grid: received 'a.jpg'; must be the name of a PNG file"),
        ([], "output_dir: give a folder for the images, or --grid samples.png"),
        (["--classes=3", "--grid=a.png"], "classes: received 3; the key is class_labels"),
        (["--class_labels=[]", "--grid=a.png"], "class_labels: received an empty list; needs at least one"),
        (["--class_labels=77", "--grid=a.png"], "class_labels: received 77; allowed are ids 0 to 9"),
        (["--class_labels=eleven,3", "--grid=a.png"], "class_labels: received 'eleven'; allowed are ids 0 to 9"),
        (["--guidance_scale=2", "--grid=a.png"], "guidance_scale: received 2.0; guidance needs class_labels"),
        (
            ["--num_images=20000", "--grid=a.png"],
            "num_images: received 20000, so 20,000 images; one command makes at most",
        ),
        (["--class_labels=3", "--num_images=2", "--grid=a.png"], "num_images: received 2; cannot be given with"),
    ],
    ids=str,
)
def test_mistakes_of_generate_are_messages(command, tiny_runs, arguments, message):
    assert message in command(GenerateConfig, generate, str(tiny_runs.pipeline), *arguments)
    assert not Path("a.png").exists()


def test_a_missing_pipeline_is_a_message(command):
    assert "pipeline: received 'runs/nope'; there is no such folder, and" in command(
        GenerateConfig, generate, "runs/nope", "--grid=a.png"
    )


def test_labels_of_the_command_line():
    names = ["cats", "dogs", "tench, Tinca tinca", "7"]
    asked = {
        "cats": ["cats"],
        "cats, dogs": ["cats", "dogs"],
        "tench, Tinca tinca": ["tench, Tinca tinca"],
        "1,cats": [1, "cats"],
        "7": ["7"],
        "7,0": ["7", 0],
        "010,-1": ["010", "-1"],
        "all": names,
    }
    assert {text: asked_labels(text, names) for text in asked} == asked
    assert (
        asked_labels(3, names) == [3]
        and asked_labels(7, names) == ["7"]
        and asked_labels([1, "cats"], names) == [1, "cats"]
    )
    assert asked_labels(None, names) is None and asked_labels("all", ["some", "all"]) == ["all"]
    assert asked_labels("all", []) == ["all"]  # not all of no classes


def test_file_names_are_readable_and_safe():
    assert file_names(["cats", "sea/lion ../x"], 2, range(9, 13))[1:3] == ["cats_0010", "sea_lion_x_0011"]
    assert file_names(["猫", "..", "a" * 300], 1, range(3)) == ["猫_0000", "image_0001", f"{'a' * 60}_0002"]


@pytest.mark.parametrize("part", ["pipeline", "vqgan"])
def test_reconstruct_measures_every_image(command, tiny_runs, tiny_pipeline, images, part):
    options = [f"--images={images}", "--output_dir=out", "--grid=grid.png"]
    lines = command(ReconstructConfig, reconstruct, str(getattr(tiny_runs, part)), *options)
    files = [str(images / name) for name in ("a/0.png", "a/2.png", "b/1.png", "b/3.png", "b/broken.jpg")]
    assert [line["file"] for line in lines] == files
    assert "psnr" not in lines[4] and lines[4]["error"]
    for line, name in zip(lines[:4], ("a_0", "a_2", "b_1", "b_3"), strict=True):
        image = Image.open(line["file"])
        assert Image.open(f"out/{name}.png").tobytes() == tiny_pipeline.reconstruct(image)[0].tobytes()
        given, made = tiny_pipeline.image_processor(image)["pixel_values"], tiny_pipeline.reconstruct(image, "pt")
        expected = 10 * np.log10(1 / ((given.to(DEVICE) + 1) / 2 - made).square().mean().item())
        assert line["psnr"] == pytest.approx(expected, abs=2e-3)
    assert Image.open("grid.png").height == 2 * 66 + 2


def test_the_mean_psnr_is_that_of_an_evaluation(tiny_pipeline, command, tiny_runs, images):
    class Batch:
        indices, skipped = torch.arange(4), ()
        pictures = [Image.open(images / name) for name in ("a/0.png", "a/2.png", "b/1.png", "b/3.png")]

        def images(self, device):
            return tiny_pipeline.image_processor(self.pictures)["pixel_values"].to(device)

    lines = command(ReconstructConfig, reconstruct, str(tiny_runs.vqgan), f"--images={images}")
    mean = np.mean([line["psnr"] for line in lines[:4]])
    assert mean == pytest.approx(evaluate_reconstruction(tiny_pipeline.vqgan, [Batch()])["psnr"], abs=2e-3)


def test_mistakes_of_reconstruct_are_messages(command, tiny_runs, images):
    model = str(tiny_runs.vqgan)
    asked = {
        f"--images={images / 'none'}": "there is no such file or folder",
        f"--images={images / 'b' / 'broken.jpg'}": "images: none of 1 can be decoded; the first:",
        f"--images=[{images}, {images / 'b' / '3.png'}, {images / 'b'}]": "images would be saved as 3_png.png",
    }
    for argument, message in asked.items():
        assert message in command(ReconstructConfig, reconstruct, model, argument)
    (images / "empty").mkdir()
    refused = command(ReconstructConfig, reconstruct, model, f"--images={images / 'empty'}")
    assert "this folder holds no images" in refused
    assert "model: received 'runs/nope'" in command(ReconstructConfig, reconstruct, "runs/nope", f"--images={images}")


def test_one_image_or_several(images):
    one = str(images / "a" / "0.png")
    assert list(image_files([one])) == ["0"]
    assert list(image_files([one, str(images / "b")])) == ["0", "1", "3", "broken"]
    (images / "b" / "1.gif").write_bytes(b"")
    assert list(image_files([str(images / "b")])) == ["1_gif", "1_png", "3", "broken"]
