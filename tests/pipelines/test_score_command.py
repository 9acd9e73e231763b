"""The command score: its lines, table, heat maps and grid, and mistakes that end in a message."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from configs import run
from pipelines.score import ScoreConfig, score
from tests.devices import DEVICE


@pytest.fixture
def images(tmp_path) -> Path:
    """Six digits, two of them in a folder, and a file that is no image."""
    for number, digit in enumerate(load_digits().images[:6]):
        path = tmp_path / "images" / ("in" if number > 3 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8)).save(path)
    (tmp_path / "images" / "3a.jpg").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def command(tiny_runs, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns its lines, or what it says when it refuses."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments, pipeline=tiny_runs.pipeline):
        try:
            run(ScoreConfig, score, "command", [str(pipeline), *arguments, f"--device={DEVICE}"])
        except SystemExit as exited:
            assert exited.code == 2
            return capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return start


def test_lines_table_heat_maps_and_grid(command, images, tiny_pipeline, monkeypatch):
    monkeypatch.setattr("pipelines.score.IMAGES_AT_ONCE", 3)
    options = ["--table=out.csv", "--output_dir=maps", "--grid=grid.png", "--grid_images=4"]
    lines = command(f"--images={images}", *options)
    names = ["0", "1", "2", "3", "3a", "in/4", "in/5"]
    assert [line["file"] for line in lines] == [str(images / f"{n}.{'jpg' if n == '3a' else 'png'}") for n in names]
    broken = lines.pop(4)
    assert broken.keys() == {"file", "error"} and broken["error"]

    pictures = [Image.open(line["file"]) for line in lines]
    out, posterior = tiny_pipeline.score(pictures), tiny_pipeline.class_posterior(pictures)
    assert [line["nats"] for line in lines] == pytest.approx(out.nats.tolist(), abs=1e-3)
    assert [line["bits_per_pixel"] for line in lines] == pytest.approx(out.bits_per_pixel.tolist(), abs=1e-4)
    assert [line["best_class"] for line in lines] == [str(number) for number in posterior.argmax(1).tolist()]
    assert [line["probability"] for line in lines] == pytest.approx(posterior.amax(1).tolist(), abs=1e-4)

    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    ranking = sorted(lines, key=lambda line: -line["nats"])
    assert [row["file"] for row in rows] == [line["file"] for line in [*ranking, broken]]
    assert float(rows[0]["nats"]) == ranking[0]["nats"] and rows[-1]["error"] == broken["error"]
    assert sorted(path.stem for path in Path("maps").iterdir()) == ["0", "1", "2", "3", "in_4", "in_5"]
    assert {(Image.open(path).mode, Image.open(path).size) for path in Path("maps").iterdir()} == {("RGB", (16, 16))}
    assert Image.open("grid.png").height == 2 * 66 + 2  # one row of images above one of heat maps


def test_the_score_as_one_of_a_class(command, images, tiny_pipeline):
    file = str(images / "2.png")
    (line,) = command(f"--images={file}", "--class_labels=7", "--best_class=false", "--table=t.jsonl")
    expected = tiny_pipeline.score(Image.open(file), 7).nats.item()
    assert line.keys() == {"file", "nats", "bits_per_pixel"} and line["nats"] == pytest.approx(expected, abs=1e-3)
    assert [json.loads(text) for text in Path("t.jsonl").read_text().splitlines()] == [line]


def test_mistakes_are_messages(command, images):
    folder = f"--images={images}"
    assert "table: received 'a.txt'; must be the name of a file that ends with .csv" in command(folder, "--table=a.txt")
    assert "class_labels: received 'eleven'; allowed are ids 0 to 9" in command(folder, "--class_labels=eleven")
    assert "class_labels: received 2 values; give one" in command(folder, "--class_labels=1,2")
    assert "images: none of 1 can be decoded; the first:" in command(f"--images={images / '3a.jpg'}")
    assert "pipeline: received 'runs/nope'" in command(folder, pipeline="runs/nope")
    Path("mine.csv").write_text("mine")
    assert "table: received 'mine.csv', which would replace mine.csv" in command(folder, "--table=mine.csv")
    assert Path("mine.csv").read_text() == "mine"
