"""The arithmetic of the benchmarks, and the results that a run reports."""

import argparse
import json
import math
from functools import partial
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from benchmarks import anomalies, compression, emoji, families, losses, restoration, run
from benchmarks.case import OURS, Case, lines, measure
from benchmarks.ideal import decode_floor, decode_operations, encode_operations, training_step_operations
from benchmarks.machine import Ceilings
from benchmarks.measuring import CPU, Times, ratio
from configs import load_config
from stage1_vqgan import Stage1Config, VQGANConfig, VQGANModel
from tests import tiny

SLOW_MACHINE = Ceilings(matmul=1e9, conv=1e9, copy=1e6)


def wait(count):
    return partial(sum, range(count))


def broken():
    raise RuntimeError("a peer of another version")


def make_case(**changes):
    lanes = {OURS: partial(wait, 10), "peer": partial(wait, 200_000)}
    settings = {"row": "sums", "setting": "small", "unit": "sums/s", "count": 2.0, "memory": False}
    return Case(**{**settings, "lanes": lanes, "agree": lambda: {"difference": 0.0}, "operations": 1e3, **changes})


def test_a_case_is_checked_and_its_lanes_compared():
    result = measure(make_case(), CPU, SLOW_MACHINE, rounds=3)
    ours, peer = result["lanes"][OURS], result["lanes"]["peer"]
    assert result["agreement"] == {"difference": 0.0} and result["floor_ms"] == 1e-3
    assert ours["time_ratio"]["median"] == 1 and peer["time_ratio"]["median"] > 10
    assert peer["per_second"] == pytest.approx(2e3 / peer["median_ms"])
    assert peer["mfu"] == pytest.approx(1e-3 / peer["median_ms"], abs=1e-3)
    assert [line["lane"] for line in lines(result)] == [OURS, "peer"]


def test_lanes_that_do_not_agree_are_not_timed():
    def disagree():
        raise AssertionError("other codes")

    with pytest.raises(AssertionError, match="other codes"):
        measure(make_case(agree=disagree), CPU, SLOW_MACHINE, rounds=3)


def test_a_peer_that_fails_is_reported_and_skipped():
    result = measure(make_case(lanes={OURS: partial(wait, 10), "peer": broken}), CPU, SLOW_MACHINE, rounds=3)
    assert list(result["lanes"]) == [OURS] and result["failed"] == {"peer": "RuntimeError: a peer of another version"}
    with pytest.raises(RuntimeError):
        measure(make_case(lanes={OURS: broken}), CPU, SLOW_MACHINE, rounds=3)


def test_ratios_are_taken_round_by_round():
    slowing = Times([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])
    assert ratio(Times([2.0, 4.0, 8.0], [3.0, 6.0, 12.0]), slowing) == {
        "median": 2.0, "p10": 2.0, "p90": 2.0, "by_cpu": 3.0, "of_minima": 2.0
    }  # fmt: skip


def test_a_run_continues_after_a_failure_and_reports_it(monkeypatch, tmp_path, capsys):
    def cases(*_):
        yield make_case(setting="broken", lanes={OURS: broken})
        yield make_case(setting="whole")

    monkeypatch.setattr(run, "ROWS", [cases])
    monkeypatch.setattr(run, "ceilings", lambda *_: SLOW_MACHINE)
    path = tmp_path / "result.json"
    for words, failures in (["sums"], 1), (["whole sums"], 0), (["broken"], 1):
        monkeypatch.setattr("sys.argv", ["run", "--rounds", "3", "--output", str(path), "--rows", *words])
        with pytest.raises(SystemExit) as end:
            run.main()
        assert end.value.code == failures
        settings = [case["setting"] for case in json.loads(path.read_text())["cases"]]
        assert settings == {"sums": ["broken", "whole"], "whole sums": ["whole"], "broken": ["broken"]}[words[0]]
    assert "failed: sums, broken" in capsys.readouterr().out


def test_operations_are_those_of_the_layers():
    config = VQGANConfig(**tiny.VQGAN)
    model = VQGANModel(config).eval()
    images = torch.zeros(1, config.in_channels, *config.image_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    half_norms = 2 * prod(config.grid) * config.num_embeddings  # our search includes them in its matrix product
    assert encode_operations(config) + decode_operations(config) == counter.get_total_flops() - half_norms
    # known values of the original's layout: 139 and 253 GFLOP per image
    f16 = load_config(Stage1Config, "imagenet256/stage1")
    assert encode_operations(f16.vqgan_config()) == pytest.approx(138.5e9, rel=0.01)
    assert decode_operations(f16.vqgan_config()) == pytest.approx(252.7e9, rel=0.01)
    f16.loss.perceptual_weight = f16.loss.adversarial_weight = 0
    assert training_step_operations(f16) == pytest.approx(3 * (138.5e9 + 252.7e9), rel=0.01)


def test_the_decode_floor_of_a_small_llama():
    config = AutoConfig.for_model(**tiny.LLAMA, num_key_value_heads=2, vocab_size=50)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention = width * width * 2 + width * (2 * width // 2)
    weights = layers * (attention + 3 * width * inner) + 40 * width
    rows, length = 6, 5
    kept = sum(rows * layers * 2 * width // 2 * seen for seen in range(1, length + 1))
    expected = 4 * (length * weights + kept) / SLOW_MACHINE.copy
    assert decode_floor(config, rows, length, 40, torch.float32)(SLOW_MACHINE) == pytest.approx(expected)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_of_the_comparison_has_settings(name):
    """Its networks are those that packages hold, so that the comparison downloads nothing."""
    args = argparse.Namespace(data="path/to/images", steps=400, output_dir="x")
    for preset in ("emoji", "medical", "own/cpu"):
        args.preset = f"{preset}/stage1"
        config = losses.settings(args, name, seed=1)
        assert config.has_discriminator == (name not in ("pixels", "none")) and config.seed == 1
        assert config.loss.lpips_backbone == "stlpips_alex" and config.loss.adversarial_start_step == 100
        offline = config.discriminator.network.startswith(("stlpips/", "efficientnet-lite0"))
        assert config.discriminator.type == "patchgan" or offline


def test_the_table_of_losses_has_the_figures_of_a_split():
    figures = {"psnr": 20.123, "ssim": 0.61234, "images": 5, "frechet_distance/efficientnet-lite0@96": 1.234}
    assert losses.row("none-0", figures) == {
        **{"loss": "none-0", "psnr": 20.12, "ssim": 0.612},
        "frechet_distance/efficientnet-lite0@96": 1.23,
    }


def test_pictures_are_tiled_and_cut_again():
    images = [Image.fromarray(np.full((8, 16), 30 * number, np.uint8)) for number in range(7)]
    picture = compression.mosaic(images)
    assert picture.size == (3 * 16, 3 * 8)
    assert [tile.tobytes() for tile in compression.tiles(picture, images[0], 7)] == [one.tobytes() for one in images]
    assert compression.psnr(images[:1], images[1:2]) == pytest.approx(10 * math.log10(255**2 / 900))


@pytest.mark.parametrize("codec", compression.QUALITIES)
def test_codecs_are_compared_at_equal_size_and_at_equal_psnr(codec):
    images = [Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8)) for digit in load_digits().images[:64]]
    results = {quality: compression.coded(images, codec, quality) for quality in range(1, 40)}
    size = results[20].size
    assert compression.at_size(images, codec, size).size <= size
    assert compression.at_size(images, codec, size).psnr >= results[19].psnr
    assert compression.at_size(images, codec, 1).name.endswith(f"quality {compression.QUALITIES[codec][0]}")
    best = compression.at_psnr(images, codec, results[20].psnr)
    assert best.psnr >= results[20].psnr and best.size <= results[20].size


@pytest.mark.parametrize("choice", ["--usual_class=3", pytest.param("--against=digits", marks=pytest.mark.slow)])
def test_anomalies_and_compression_of_a_pipeline(tiny_runs, tmp_path, monkeypatch, capsys, choice):
    common = [str(tiny_runs.pipeline), "--data=digits", "--images=60", f"--output_dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["anomalies", *common, choice])
    anomalies.main()
    rows = {row["measure"]: row for row in json.loads((tmp_path / "anomalies.json").read_text())["rows"]}
    if choice == "--against=digits":  # nothing tells a data set from itself
        assert {row["AUROC"] for row in rows.values()} == {0.5} and len(rows) == 4
        return
    assert len(rows) == 7 and all(0 <= row["AUROC"] <= 1 for row in rows.values())
    pytest.importorskip("constriction")
    monkeypatch.setattr("sys.argv", ["compression", *common])
    compression.main()
    result = json.loads((tmp_path / "compression.json").read_text())
    for variant in result["ours"].values():
        # a prior of 20 steps still expects tokens that are no codes, which the score counts and the coder does not
        assert 0.9 * variant["score_bytes"] < variant["bytes"] - 47 < 1.01 * variant["score_bytes"]
    assert result["rows"][0]["bits/pixel"] == 5 * 16 / 256 and len(result["rows"]) == 7
    assert Image.open(tmp_path / "compression.png").height == 6 * 66 + 2


def test_psnr_and_colour_of_restored_images():
    gray, red = torch.zeros(2, 3, 4, 4), torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert restoration.psnr(gray + 0.02, gray) == pytest.approx(20 * math.log10(2 / 0.02), rel=1e-5)
    assert restoration.colour(gray) == 0 and restoration.colour(red) == 1
    images = [Image.fromarray(((red[0] + 1) * 127.5).byte().permute(1, 2, 0).numpy())]
    assert torch.equal(restoration.pixels_of(images), red[:1])


def test_priors_of_other_classes_or_sizes_are_not_compared():
    def pipeline(names, size):
        return SimpleNamespace(class_names=names, layout=SimpleNamespace(image_shape=(size, size)))

    first = SimpleNamespace(kind=(["ant", "bee"], (16, 16)))
    families.Real.require(first, "folder", pipeline(["ant", "bee"], 16))
    for other in (pipeline([], 16), pipeline(["ant", "cat"], 16), pipeline(["ant", "bee"], 32)):
        with pytest.raises(SystemExit, match=r"folder: .* classes"):
            families.Real.require(first, "folder", other)


def test_retrieval_counts_the_emoji_of_the_style_alone():
    real = torch.nn.functional.one_hot(torch.arange(4)).float()
    asked = emoji.Emoji([], np.array([0, 0, 1, 1]), np.zeros(4), [], ["a", "b", "a", "b"])
    found = real[[0, 0, 2, 3]]
    found[2] += 2 * real[1]  # most like "b" of the other style; of its own style, most like "a"
    assert emoji.retrieval(found, real, asked) == {"top_1": 0.75, "top_5": 1.0, "chance": 0.5}
