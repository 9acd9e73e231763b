"""The ablation: its variants are settings of the presets, its statistics those of the textbook, and it resumes."""

import argparse
import json
import math
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import ablation
from benchmarks.ablation import BASE, FAULTS, VARIANTS, chosen, comparisons, folders_of, main, settings
from benchmarks.cpu_time import complete, seconds_of
from benchmarks.differences import all_tables, compare
from benchmarks.stages import Folders, overrides

SMALL = [
    *("--stage1", "max_steps=20", "model.base_channels=8", "model.norm_num_groups=4"),
    *("--stage2", "max_steps=20", "num_views=2", "model.hidden_size=32", "model.num_hidden_layers=1"),
    *("--evaluate", "samples_per_class=5", "max_real_images=300"),
]


def arguments(tmp_path, preset="digits", variants=tuple(VARIANTS)[1:], **parts) -> argparse.Namespace:
    named = {"stage1": {}, "stage2": {}, "evaluate": {}, **parts}
    return argparse.Namespace(
        preset=preset, data=None, num_workers=0, output_dir=tmp_path, variants=list(variants), **named
    )


def test_the_variants_that_digits_can_have(tmp_path):
    names, left_out = chosen(arguments(tmp_path))
    assert left_out.keys() == {"no_perceptual", "perceptual"}
    assert left_out["no_perceptual"] == "the base line is like this"
    assert "needs 21 pixels" in left_out["perceptual"]
    assert names == [name for name in VARIANTS if name not in left_out]


def test_all_variants_are_settings_of_a_larger_preset(tmp_path):
    names, left_out = chosen(arguments(tmp_path, "fashion_mnist"))
    assert names == list(VARIANTS) and not left_out
    # what the arguments state holds for all variants, but for what they change
    stated = overrides(["loss.perceptual_weight=0", "ema_decay=0.9", "loss.adversarial_weight=0"])
    names, left_out = chosen(arguments(tmp_path, "fashion_mnist", stage1=stated))
    assert left_out.keys() == {"no_perceptual", "no_discriminator"} and "tokenizer_no_ema" in names


def test_a_base_line_with_wrong_settings_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model\.num_embeddings: .*-1"):
        chosen(arguments(tmp_path, stage1={"model.num_embeddings": -1}))
    _, left_out = chosen(arguments(tmp_path, stage2={"model": {"model_type": "gpt2"}}))
    assert left_out["qwen3"].endswith("model.model_type: received 'gpt2'; the variant needs llama")


@pytest.mark.parametrize("preset", ["digits", "fashion_mnist"])
def test_priors_of_other_architectures_have_the_size_of_the_preset(tmp_path, preset):
    args, folders = arguments(tmp_path, preset), Folders.within(tmp_path)
    priors = [settings(args, VARIANTS[name], 0, folders).stage2.model for name in (BASE, "qwen3", "gpt2")]
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(AutoConfig.for_model(**prior, vocab_size=267)) for prior in priors]
    weights = [sum(weight.numel() for weight in model.parameters() if weight.ndim == 2) for model in models]
    positions = 1024 * priors[0]["hidden_size"]  # of gpt2; the code store shortens them
    assert [model.config.model_type for model in models] == ["llama", "qwen3", "gpt2"]
    assert weights[1] == weights[0] and weights[2] - positions == weights[0]


def test_variants_share_the_tokenizer_and_the_codes_they_can_share(tmp_path):
    base = folders_of(tmp_path, BASE)
    for name in VARIANTS:
        own = folders_of(tmp_path, name)
        shared = {part for part, folder in own._asdict().items() if folder == getattr(base, part)}
        expected = set() if VARIANTS[name].stage1 else {"tokenizer", "codes", "prior"}
        if VARIANTS[name].stage2 or VARIANTS[name].architecture:
            expected -= {"prior"}
        if name in ("one_view", "prior_overtrained"):
            expected -= {"codes"}
        assert name == BASE or shared == expected, name


def test_every_part_of_a_run_has_its_seed(tmp_path):
    run = settings(arguments(tmp_path), VARIANTS["one_view"], 7, Folders.within(tmp_path))
    assert [run.stage1.seed, run.stage2.seed, run.evaluation.seed] == [7, 7, 7] and run.stage2.num_views == 1
    assert run.build.sampling_defaults == {"guidance_scale": 1.5} and run.evaluation.guidance_scale is None
    fault = settings(arguments(tmp_path), FAULTS["temperature_2"], 7, Folders.within(tmp_path))
    assert fault.build.sampling_defaults == {"guidance_scale": 1.5, "temperature": 2.0}
    assert fault.build.prior == str(Folders.within(tmp_path).prior)


def test_differences_are_paired_by_seed():
    base, values = {0: 1.0, 1: 2.0, 2: 4.0, 3: 9.0}, {2: 4.5, 0: 1.1, 1: 2.4}
    one = compare(values, base)
    paired = stats.ttest_rel([1.1, 2.4, 4.5], [1.0, 2.0, 4.0])
    assert (one.seeds, one.pairs) == (3, 3) and one.mean == pytest.approx(8 / 3)
    assert one.spread == pytest.approx(math.sqrt(sum((v - 8 / 3) ** 2 for v in values.values()) / 2))
    assert one.difference == pytest.approx(1 / 3) and one.difference / one.error == pytest.approx(paired.statistic)
    assert one.verdict == "." and paired.pvalue > 0.05
    assert compare({0: 1.1, 1: 2.11, 2: 4.09}, base).verdict == "+"
    assert compare({0: 0.9, 1: 1.89, 2: 3.91}, base).verdict == "-"
    assert compare(base, base).verdict == "=" and compare({0: 5.0}, base).verdict == "?"
    assert asdict(compare({0: 5.0}, {})) == {
        "seeds": 1, "mean": 5.0, "spread": None, "pairs": 0, "difference": None, "error": None
    }  # fmt: skip


def test_tables_leave_out_what_cannot_be_compared():
    def run(value):
        return {"psnr": value, "bits_per_pixel": value / 10}

    results = {
        BASE: {0: run(20.0), 1: run(21.0)},
        "codebook_64": {0: run(18.0), 1: run(19.01)},
        "gpt2": {0: {"psnr": 20.0, "bits_per_pixel": 2.1}},
        "qwen3": {0: {"bits_per_pixel": 2.0, "suspected_copies": 0.1}},  # what others lack
    }
    text = all_tables(comparisons(results), ablation.FIGURES)
    psnr, bits, copies, verdicts = ([line.split() for line in part.splitlines()] for part in text.split("\n\n"))
    assert psnr[1:] == [
        ["baseline", "2", "20.50", "±", "0.71"],
        ["codebook_64", "2", "18.51", "±", "0.71", "-1.99", "±", "0.01"],
        ["gpt2", "1", "20.00", "+0.00"],
    ]
    assert bits[2] == ["codebook_64", "2", "1.8505", "±", "0.0714"]  # other codes
    assert bits[3] == ["gpt2", "1", "2.1000", "+0.1000"]
    assert copies[1:] == [["qwen3", "1", "0.100"]]
    assert verdicts[1:5] == [["baseline"], ["codebook_64", "-"], ["gpt2", "?", "?"], ["qwen3", "?"]]


def test_seconds_of_an_interrupted_part_are_added(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    monkeypatch.setattr("benchmarks.cpu_time.cpu_seconds", lambda: next(clock))
    folder = tmp_path / "run" / "prior"

    def fail():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        complete(folder, "results", fail)
    complete(folder, "results", lambda: folder.mkdir() or (folder / "results").touch())
    complete(folder, "results", lambda: None)  # it is done: the clock is not asked again
    assert seconds_of(folder) == 5 and seconds_of(folder.with_name("codes")) == 0


@pytest.mark.slow
def test_an_ablation(tmp_path, capsys):
    command = ["digits", "--variants", "gpt2", "perceptual", *SMALL, f"--output_dir={tmp_path}"]
    main([*command, "--seeds", "0", "1"])
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert result["left_out"].keys() == {"perceptual"} and result["results"].keys() == {BASE, "gpt2"}
    figures = result["results"]["gpt2"]["1"]
    # this tokenizer makes some digits equal, so copies cannot be told
    assert figures.keys() | {"suspected_copies"} == ablation.FIGURES.keys() and figures["cpu_seconds"] > 0
    assert figures["psnr"] == result["results"][BASE]["1"]["psnr"] != result["results"][BASE]["0"]["psnr"]
    assert result["comparisons"]["psnr"]["gpt2"]["error"] == 0
    assert not (tmp_path / "seed_0/gpt2/vqgan").exists() and (tmp_path / "seed_0/gpt2/prior").is_dir()

    with Image.open(tmp_path / "variants.png") as picture:
        assert picture.width > 2 * picture.height > 0

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed_*/*/run.json")}
    main([*command, "--seeds", "0", "1"])  # nothing is repeated
    assert json.loads((tmp_path / "ablation.json").read_text())["results"] == result["results"]
    assert before == {path: path.stat().st_mtime_ns for path in before}

    capsys.readouterr()
    with pytest.raises(SystemExit):  # other settings in the same folder
        main([*command, "--stage1", "max_steps=10"])
    assert "max_steps" in capsys.readouterr().out
