"""Sampling defaults of a pipeline: they serve arguments that are left out, and are saved with it."""

import copy
import json
import pickle

import pytest
import torch

from configs import ConfigError, load_config, run
from configs.checksums import Damaged, verify_checksums, write_checksums
from pipelines import VQGANPipeline, hub
from pipelines.build import BuildConfig, build
from pipelines.defaults import STANDARD
from pipelines.demo import actions
from pipelines.generate import GenerateConfig, generate
from pipelines.model_card import model_card
from tests import prompted
from tests.random_pipelines import random_pipeline

DEFAULTS = {"guidance_scale": 2.5, "guidance_schedule": "cosine", "temperature": 0.7, "min_p": 0.1}


@pytest.fixture
def pipeline(random_prior):
    return random_pipeline(random_prior)


@pytest.fixture
def masked(random_prior):
    return random_pipeline(random_prior, family="masked")


def codes_of(pipeline, labels=("ant", "bee", "cat"), **options):
    asked = {"class_labels": list(labels), "num_images_per_label": 3} if labels else {"num_images": 3}
    return pipeline.generate(**asked, seed=0, output_type="codes", **options).codes


def test_they_serve_what_is_left_out(pipeline):
    standard = codes_of(pipeline)
    assert torch.equal(standard, codes_of(pipeline, **STANDARD)) and pipeline.sampling_defaults == {}
    stated = codes_of(pipeline, **DEFAULTS)
    one = codes_of(pipeline, **DEFAULTS | {"temperature": 1.3})
    assert len({str(codes) for codes in (standard, stated, one)}) == 3
    pipeline.sampling_defaults = DEFAULTS
    assert torch.equal(codes_of(pipeline), stated) and torch.equal(codes_of(pipeline, **STANDARD), standard)
    assert torch.equal(codes_of(pipeline, temperature=1.3), one)
    images = pipeline.generate("bee", seed=1).images
    assert torch.equal(pipeline.vary(images, 1.0, "bee", seed=4).codes, pipeline.generate("bee", seed=4).codes)
    for again in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(codes_of(again), stated)
    pipeline.sampling_defaults = {}
    assert torch.equal(codes_of(pipeline), standard)


def test_lists_of_scales_win_too(pipeline):
    expected = codes_of(pipeline, guidance_scale=[1.0, 3.0, 2.0])
    pipeline.sampling_defaults = {"guidance_scale": 5.0}
    assert torch.equal(codes_of(pipeline, guidance_scale=[1.0, 3.0, 2.0]), expected)


def test_guidance_is_for_conditions_that_are_given(pipeline, monkeypatch):
    expected = codes_of(pipeline, labels=())
    pipeline.sampling_defaults = {"guidance_scale": 2.5}
    assert torch.equal(codes_of(pipeline, labels=()), expected)

    parts = prompted.make_parts()
    segments = prompted.make_segments(parts)
    several = prompted.make(parts, [segments["animal"], segments["style"]])
    asked = {"class_labels": {"style": "flat"}, "seed": 0, "output_type": "codes"}
    expected = several.generate(**asked, guidance_scale={"style": 3.0}).codes
    several.sampling_defaults = {"guidance_scale": {"style": 3.0, "animal": 2.0}}
    assert torch.equal(several.generate(**asked).codes, expected)
    assert not torch.equal(several.generate(**asked, guidance_scale=1.0).codes, expected)


def test_those_of_a_masked_prior(masked):
    expected = codes_of(masked, num_steps=4, order_temperature=20.0)
    halton, five = codes_of(masked, num_steps=4, order="halton"), codes_of(masked, order_temperature=5.0)
    masked.sampling_defaults = {"num_steps": 4, "order_temperature": 20.0}
    assert torch.equal(codes_of(masked), expected)
    assert torch.equal(codes_of(masked, order="halton"), halton)  # it has no temperature
    reports = []
    actions.generate(masked, 8, [0], 1, 0, 1.0, lambda done, total: reports.append((done, total)))
    assert reports[-1] == (4, 4)
    masked.sampling_defaults = {"order": "halton"}
    assert torch.equal(codes_of(masked, num_steps=4), halton)
    assert torch.equal(codes_of(masked, order_temperature=5.0), five)


REFUSED = {
    "unknown key": ({"guidance": 2.0}, "sampling_defaults: received the key 'guidance'; allowed are guidance_scale,"),
    "no dictionary": ([("top_k", 1)], "sampling_defaults: received .*; must be a dictionary"),
    "out of range": ({"top_p": 1.5}, "top_p: received 1.5; allowed is"),
    "schedule": ({"guidance_schedule": "cosin"}, "guidance_schedule: received 'cosin'; allowed are"),
    "scales of prompts": ({"guidance_scale": [1.0, 2.0]}, "guidance_scale: received .*; a default is a number"),
    "unknown condition": ({"guidance_scale": {"style": 2.0}}, "guidance_scale: received the condition 'style'"),
    "steps of a causal prior": ({"num_steps": 4}, "num_steps: received 4; this prior is causal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_defaults_are_refused(pipeline, case):
    values, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        pipeline.sampling_defaults = values
    with pytest.raises(ValueError, match=words):
        VQGANPipeline(**pipeline.components | {"sampling_defaults": values})
    with pytest.raises(TypeError):
        pipeline.sampling_defaults["top_k"] = 3  # read-only, so that nobody changes them unchecked
    assert pipeline.sampling_defaults == {}


def test_guidance_that_the_prior_has_not_learnt_is_refused(random_prior):
    parts = prompted.make_parts()
    several = prompted.make(parts, [prompted.make_segments(parts)["animal"]], has_null=False)
    several.sampling_defaults = {"guidance_scale": {"animal": 2.0}}
    assert several.sampling_defaults == {"guidance_scale": 2.0}  # the only condition needs no name
    plain = prompted.make(parts, [], ("ant", "bee"), has_null=False)
    with pytest.raises(ValueError, match="guidance_scale: this prior was trained without condition dropout"):
        plain.sampling_defaults = {"guidance_scale": 2.0}
    without = prompted.make(parts, [])
    with pytest.raises(ValueError, match=r"guidance_scale: received 2\.0; guidance needs class_labels"):
        without.sampling_defaults = {"guidance_scale": 2.0}


def test_they_are_saved_and_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "old")
    assert "sampling_defaults" not in json.loads((tmp_path / "old/model_index.json").read_text())
    pipeline.sampling_defaults = DEFAULTS | {"guidance_interval": (0.0, 0.5)}
    pipeline.save_pretrained(tmp_path / "new")
    loaded = VQGANPipeline.from_pretrained(tmp_path / "new")
    assert loaded.sampling_defaults == pipeline.sampling_defaults
    assert torch.equal(codes_of(loaded), codes_of(pipeline))
    assert "sampling defaults: guidance_scale 2.5, guidance_schedule cosine" in repr(loaded)
    card = model_card(tmp_path / "new", "me/mine", "mit")
    assert "left out: guidance_scale 2.5," in card and "num_images_per_label=4).images" in card
    assert "num_images_per_label=4).images" in model_card(tmp_path / "old", "me/mine", "mit")


def test_an_unknown_key_in_a_folder_is_an_error(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"sampling_defaults": {"cfg": 2}}))
    write_checksums(tmp_path)
    with pytest.raises(ValueError, match="sampling_defaults: received the key 'cfg'"):
        VQGANPipeline.from_pretrained(tmp_path)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_new_defaults_leave_all_else_as_it_is(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    before = files_of(tmp_path)

    def fail(*args):
        raise OSError("no power")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no power"):
        patch.setattr("configs.staging.write_checksums", fail)
        hub.save_defaults(tmp_path, DEFAULTS)
    assert files_of(tmp_path) == before
    hub.save_defaults(tmp_path, DEFAULTS)
    after = files_of(tmp_path)
    assert {str(path) for path in before if before[path] != after[path]} == {"model_index.json", "checksums.json"}
    assert (
        json.loads((tmp_path / "checksums.json").read_text()).keys()
        == json.loads(before[next(path for path in before if str(path) == "checksums.json")]).keys()
    )
    verify_checksums(tmp_path)
    assert VQGANPipeline.from_pretrained(tmp_path).sampling_defaults == DEFAULTS
    hub.save_defaults(tmp_path, {})
    assert files_of(tmp_path) == before
    (tmp_path / "prior" / "checksums.json").write_text("{}")
    with pytest.raises(Damaged):
        hub.save_defaults(tmp_path, DEFAULTS)


def test_a_build_keeps_those_of_the_same_weights(tiny_runs, tmp_path):
    parts = {"tokenizer": str(tiny_runs.vqgan), "prior": str(tiny_runs.prior), "output_dir": str(tmp_path)}
    metrics = tmp_path / "card" / "metrics.json"  # of an evaluation, for the card
    build(BuildConfig(**parts))
    hub.save_defaults(tmp_path, DEFAULTS)
    metrics.write_text("{}")
    build(BuildConfig(**parts))
    pipeline = VQGANPipeline.from_pretrained(tmp_path)
    assert pipeline.sampling_defaults == DEFAULTS and metrics.is_file()
    with torch.no_grad():
        pipeline.prior.lm_head.weight += 1
    pipeline.save_pretrained(tmp_path)
    build(BuildConfig(**parts))
    assert VQGANPipeline.from_pretrained(tmp_path).sampling_defaults == {} and not metrics.exists()


def test_a_build_records_those_that_it_is_given(tiny_runs, tmp_path):
    parts = {"tokenizer": str(tiny_runs.vqgan), "prior": str(tiny_runs.prior), "output_dir": str(tmp_path)}
    wrong = load_config(BuildConfig, overrides=parts | {"sampling_defaults.top_p": 2})
    with pytest.raises(ConfigError, match=r"sampling_defaults: top_p: received 2; allowed"):
        build(wrong)
    build(BuildConfig(**parts, sampling_defaults={"temperature": 0.7}))
    build(load_config(BuildConfig, overrides=parts | {"sampling_defaults.guidance_scale": 1.5}))
    assert VQGANPipeline.from_pretrained(tmp_path).sampling_defaults == {"guidance_scale": 1.5}


def test_the_command_uses_and_prints_them(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline.sampling_defaults = DEFAULTS
    pipeline.save_pretrained("pipe")
    expected = pipeline.generate("bee", seed=3, top_k=5).images[0]
    options = ["pipe", "--class_labels=bee", "--seed=3", "--top_k=5", "--output_dir=out", "--device=cpu"]
    run(GenerateConfig, generate, "command", options)
    line = json.loads(capsys.readouterr().out)
    assert {name: line[name] for name in STANDARD} == json.loads(json.dumps(STANDARD | DEFAULTS | {"top_k": 5}))
    expected.save("expected.png")
    assert (tmp_path / line["file"]).read_bytes() == (tmp_path / "expected.png").read_bytes()
