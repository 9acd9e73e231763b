"""What a second evaluation measures: what has changed since the first one, or was missing then."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Value
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.evaluation import generation, run, subject
from pipelines.evaluation.generation import figures_of
from pipelines.evaluation.generation_config import GenerationMetricsConfig
from pipelines.evaluation.run import evaluate
from stage1_vqgan import DataConfig, fingerprint_of_images, load_images
from tests.feature_networks import small_network
from tests.image_files import write_folder, write_parquet
from tests.pipelines.evaluation.sampling_runs import config_of, make_pipeline


@pytest.fixture
def config(tmp_path):
    """An evaluation with 60 digits of each split, in a folder of PNG files."""
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    digits = load_digits()
    for number in range(120):
        place = tmp_path / "data" / ("train", "validation")[number // 60] / str(digits.target[number])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(place / f"{number}.bmp")
    data = {"dataset": str(tmp_path / "data"), "validation_split": "validation"}
    return config_of(tmp_path, "out", data=data, samples_per_class=2)


@pytest.mark.slow
def test_other_real_images_in_the_same_files_are_measured(config, tmp_path, monkeypatch):
    """The files keep names, sizes and times. An interrupted evaluation does not go on with old images either."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run, "generation_metrics", lambda *_: exec("raise KeyboardInterrupt"))
        evaluate(config)
    paths = sorted((tmp_path / "data" / "validation").glob("*/*.bmp"))
    for path in paths[:20]:
        time, size = path.stat().st_mtime_ns, path.stat().st_size
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        os.utime(path, ns=(time, time))
        assert path.stat().st_size == size
    metrics = evaluate(config)
    assert metrics == evaluate(replace(config, output_dir=str(tmp_path / "straight"))) | {
        key: metrics[key] for key in ("seconds", "inputs")
    }
    Image.fromarray(255 - np.asarray(Image.open(paths[0]))).save(paths[0])
    assert evaluate(config)["frechet_distance"] != metrics["frechet_distance"]
    monkeypatch.setattr(run, "_evaluated", None)
    assert evaluate(config)["inputs"]["images"][0] == metrics["inputs"]["images"][0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.usefixtures("datasets_cache")
def test_the_fingerprint_is_that_of_the_images_that_are_read(tmp_path, streaming):
    def prints(*values, labels=(0, 1) * 5, count=4):
        rows = {"picture": [Image.new("L", (4, 4), value) for value in values], "y": list(labels)}
        path = write_parquet(tmp_path / "data.parquet", rows, y=Value("int64"))
        data = DataConfig(dataset=path, label_column="y", streaming=streaming, validation_fraction=0.1)
        return [fingerprint_of_images(source, count) for source in load_images(data)]

    first = prints(*range(10))
    assert first == prints(*range(10)) and first[0] != first[1]
    assert (prints(*range(9), 90) == first) is streaming  # of a stream, the first ones are read
    assert prints(0, 90, *range(2, 10))[0] != first[0]
    assert prints(*range(10), labels=(1, 0) * 5) != first


def test_a_file_that_is_missing_or_changes_changes_the_fingerprint(tmp_path):
    folder = write_folder(tmp_path / "images", {f"{value}.png": value for value in range(6)})
    found = [fingerprint_of_images(load_images(DataConfig(dataset=folder, validation_fraction=0.5))[0], 10)]
    source = load_images(DataConfig(dataset=folder, validation_fraction=0.5))[0]
    path = source.encoded([0])[0].content
    write_folder(tmp_path, {os.path.relpath(path, tmp_path): 9})
    found.append(fingerprint_of_images(source, 10))
    os.remove(path)
    found.append(fingerprint_of_images(source, 10))
    assert len(set(found)) == 3


def test_figures_that_were_left_out_are_measured_when_they_can_be(config, tmp_path, monkeypatch, capsys):
    def missing(name):
        raise FileNotFoundError("no weights here")

    config = replace(config, metrics=GenerationMetricsConfig(feature_networks=["timm/a", "timm/b"]))
    here = {"timm/a": small_network, "timm/b": missing}
    monkeypatch.setattr(generation, "load_network", lambda name: here[name](name))
    first = evaluate(config)
    assert set(first["left_out"].values()) == {"no weights here; the next run tries again"}
    assert sorted(first["left_out"]) == sorted(figures_of("timm/b"))

    monkeypatch.setattr(run, "measure", None)  # nothing else is measured again
    assert evaluate(config) == json.loads(json.dumps(first))
    here["timm/b"] = small_network
    del here["timm/a"]
    second = evaluate(config)
    assert second["left_out"] == {} and {key: second[key] for key in first if "timm/a" in key} == {
        key: value for key, value in first.items() if "timm/a" in key
    }
    for name in figures_of("timm/b"):
        assert second[name] == pytest.approx(first[name.replace("/b", "/a")], abs=1e-9)
        assert second["details"][name] == first["details"][name.replace("/b", "/a")]
    others = first.keys() - {"left_out", "details"}
    assert {key: second[key] for key in others} == json.loads(json.dumps({key: first[key] for key in others}))
    assert f"\n{figures_of('timm/b')[0]} " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == second
    del here["timm/b"]
    assert evaluate(config) == second


@pytest.mark.slow
def test_few_images_are_not_tried_again(config, monkeypatch):
    monkeypatch.setattr(generation, "load_network", small_network)
    few = replace(
        config, metrics=GenerationMetricsConfig(feature_networks=["timm/a"]), max_real_images=9, num_components=2
    )
    first = evaluate(few)
    assert first["left_out"]["kid/timm/a"] == "9 images; it needs 10 in each set"
    monkeypatch.setattr(run, "_evaluated", None)
    assert evaluate(few) == json.loads(json.dumps(first))


def test_the_pipeline_is_loaded_on_the_device_of_the_process(config, monkeypatch):
    """`accelerate launch --cpu` also holds for one process on a machine with a GPU."""
    asked = []

    def load(*args):
        asked.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "load_pipeline", load)
    with pytest.raises(KeyboardInterrupt):
        subject.open_subject(config, SimpleNamespace(num_processes=1, device=torch.device("cpu")))
    assert asked == [(config.pipeline, "cpu")]
