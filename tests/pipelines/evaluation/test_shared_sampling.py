"""Images in shards: two processes make those of one, and an interrupted run goes on."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from configs import ConfigError
from configs.checksums import Damaged
from configs.randomness import draw_seeds
from pipelines.evaluation import generated, run, shards
from pipelines.evaluation.generated import asked_of, generate_samples, store_samples
from pipelines.evaluation.run import evaluate
from pipelines.evaluation.shards import ImageShards
from tests import forks
from tests.devices import cpu_only
from tests.pipelines.evaluation.sampling_runs import (
    config_of,
    evaluate_in_small_shards,
    killed_at_the_third_shard,
    make_pipeline,
    small_shards,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    make_pipeline().save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    evaluate_in_small_shards(folder, "one")
    return folder / "one"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@cpu_only
def test_two_processes_equal_one(folder, one):
    """30 images in 4 shards, 60 real images in 8 shards of each split."""
    log = folder / "log.txt"
    forks.run_on_two_processes(evaluate_in_small_shards, folder, "two", log=log)
    first, second = (contents(path / "samples") for path in (one, folder / "two"))
    assert len(first) == 4 and first == second
    single, double = (json.loads((path / "metrics.json").read_text()) for path in (one, folder / "two"))
    for metrics in (single, double):
        del metrics["seconds"], metrics["inputs"]
    assert single == double and single["details"]["frechet_distance"]["reference"] == "60 validation images"
    assert log.read_text().count("frechet_distance_real ") == 1  # one process prints the table


def test_the_shards_hold_what_generate_returns(folder, one):
    pipeline = make_pipeline()
    seeds = torch.randint(2**63 - 1, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = pipeline.generate(np.repeat(range(10), 3), seed=seeds, guidance_scale=1.5).images
    images = ImageShards(one / "samples")
    assert len(images) == 30 and images.shape == (16, 16, 1)
    levels = images.stored(range(30))[..., 0]
    assert levels.dtype == np.uint8 and np.array_equal(levels, np.stack([np.asarray(image) for image in expected]))
    in_memory, labels = generate_samples(config_of(folder, "one"), pipeline)
    assert torch.equal(images.read(range(5, 27)), in_memory[5:27])
    assert labels["class"].tolist() == np.repeat(range(10), 3).tolist()
    assert not (one / "real_images").exists()


def test_the_seed_of_an_image_depends_on_its_number_alone():
    few, many = (draw_seeds(count, torch.Generator().manual_seed(5)) for count in (7, 1000))
    assert torch.equal(few, many[:7]) and len(many.unique()) == 1000


def test_settings_that_are_left_out_are_the_defaults_of_the_pipeline(folder):
    pipeline = make_pipeline()
    pipeline.sampling_defaults = {"guidance_scale": 2.0, "temperature": 0.8}
    own, given = (asked_of(config_of(folder, "one", guidance_scale=scale), pipeline) for scale in (None, 1.25))
    assert own.settings == {"guidance_scale": 2.0, "temperature": 0.8}
    assert (given.options.guidance_scale, given.options.temperature) == (1.25, 0.8)
    assert own.record != given.record


def test_an_interrupted_run_goes_on(folder, one, tmp_path, monkeypatch):
    pipeline, write, written = make_pipeline(), shards.write_shard, []

    def interrupted(path, images, notes=None):
        if len(written) == 2:
            (path.parent / f"{path.name}.partial").write_bytes(b"a part of it")  # as after SIGKILL
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, images, notes)

    with small_shards():
        asked = asked_of(config_of(folder, "one"), pipeline)
        arguments = (tmp_path, pipeline, {"weights": "w"}, asked, PartialState())
        monkeypatch.setattr(generated, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store_samples(*arguments)
        assert set(contents(tmp_path)) == {"00000.npy", "00001.npy"}
        written.clear()
        assert len(store_samples(*arguments)) == 30
        assert written == ["00002.npy", "00003.npy"] and contents(tmp_path) == contents(one / "samples")
        other = replace(asked, seeds=asked.seeds + 1)
        monkeypatch.setattr(generated, "write_shard", write)
        found = store_samples(tmp_path, pipeline, {"weights": "w"}, other, PartialState())
    assert len(found) == 30 and not contents(tmp_path).items() & contents(one / "samples").items()


@pytest.mark.slow
@cpu_only
def test_a_killed_evaluation_goes_on(folder, one):
    log = folder / "killed.txt"
    process = forks.start(killed_at_the_third_shard, (folder, "killed"), log)
    assert forks.end(process, log) == -signal.SIGKILL
    samples = folder / "killed" / "samples"
    assert sorted(contents(samples)) == ["00000.npy", "00001.npy"] and (samples / "00002.npy.partial").is_file()
    before = (samples / "00001.npy").stat().st_mtime_ns
    evaluate_in_small_shards(folder, "killed")
    assert contents(samples) == contents(one / "samples") and (samples / "00001.npy").stat().st_mtime_ns == before
    straight, resumed = (json.loads((path / "metrics.json").read_text()) for path in (one, folder / "killed"))
    assert straight["details"] == resumed["details"] and straight["psnr"] == resumed["psnr"]
    assert not list(samples.glob("*.partial")) and not (folder / "killed" / "real_images").exists()


def test_values_of_other_than_8_bits_stay_floats(folder, tmp_path):
    pipeline = make_pipeline()
    pipeline.image_processor.value_range = [0.0, 4095.0]
    asked = asked_of(config_of(folder, "one"), pipeline)
    images = store_samples(tmp_path, pipeline, {}, asked, PartialState())
    expected = pipeline.generate(
        np.repeat(range(10), 3), seed=asked.seeds.tolist(), guidance_scale=1.5, output_type="pt"
    )
    torch.testing.assert_close(images.read(range(30)), expected.images.cpu() * 2 - 1)
    assert len(images.read(range(30)).unique()) > 256


def test_a_damaged_shard_is_named(one, tmp_path):
    content = (one / "samples" / "00000.npy").read_bytes()
    (tmp_path / "00000.npy").write_bytes(content[:-100])
    with pytest.raises(
        Damaged, match=r"00000\.npy: cannot be read .*; remove it, and the same command writes it again"
    ):
        ImageShards(tmp_path)


def test_a_causal_prior_takes_no_steps(folder):
    with pytest.raises(ConfigError, match="num_steps: received 3; this prior is causal"):
        evaluate(config_of(folder, "refused", num_steps=3))


def test_without_classes(folder):
    asked = asked_of(config_of(folder, "one"), make_pipeline(class_names=()))
    assert len(asked) == 3 and asked.labels == {} and asked.options.guidance_scale == 1.0


def test_classes_in_another_order_are_refused(tmp_path):
    make_pipeline(class_names=tuple("9876543210")).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ConfigError, match=r"data\.dataset: it has the classes 0, 1, .*, but the prior has 9, 8, "):
        evaluate(config_of(tmp_path, "out"))
    assert not list((tmp_path / "out" / "samples").glob("*.npy"))  # before the first image


@pytest.mark.slow
def test_an_evaluation_with_a_guidance_interval_is_not_made_twice(tmp_path, monkeypatch):
    pipeline = make_pipeline()
    pipeline.sampling_defaults = {"guidance_interval": (0.0, 0.5)}
    pipeline.save_pretrained(tmp_path / "pipeline")
    first = evaluate(config_of(tmp_path, "out"))
    monkeypatch.setattr(run, "_evaluated", None)
    again = evaluate(config_of(tmp_path, "out"))
    assert again == json.loads(json.dumps(first)) and again["settings"]["guidance_interval"] == [0.0, 0.5]


def test_metrics_of_replaced_weights_are_not_shown(tmp_path, monkeypatch, capsys):
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    evaluated = run._evaluated

    def replaced_meanwhile(*args):
        other = make_pipeline()
        other.prior.lm_head.weight.data += 1
        other.save_pretrained(tmp_path / "pipeline")
        return evaluated(*args)

    monkeypatch.setattr(run, "_evaluated", replaced_meanwhile)
    assert evaluate(config_of(tmp_path, "out"))
    assert "does not show the metrics: its weights were replaced meanwhile" in capsys.readouterr().out
    assert "class_accuracy" not in (tmp_path / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_pictures_of_other_settings_do_not_stay(folder):
    """The first evaluation checks for copies. Too few held-out images for that are a reason in the second one."""
    output = folder / "pictures"
    assert "suspected_copies" in evaluate(config_of(folder, "pictures", export=str(folder / "samples.npz")))
    assert (output / "copies.png").is_file()
    values = {"samples": str(folder / "samples.npz"), "pipeline": None, "max_real_images": 12, "num_components": 4}
    assert "suspected_copies" in evaluate(config_of(folder, "pictures", **values))["left_out"]
    assert sorted(path.name for path in output.glob("*.png")) == ["samples.png"]
