"""Scores, class posteriors and compression by a prior with several conditions, against loops over codes and classes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError, load_config
from pipelines import compressed_file
from pipelines.score import ScoreConfig, asked_of, score
from tests.prompted import ANIMALS, STYLES, make, make_parts, make_segments, prompts_of

OVERHEAD = 47  # bytes of the header and the checksums


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def segments(parts):
    return make_segments(parts)


@pytest.fixture(scope="module")
def pipeline(parts, segments):
    return make(parts, [segments[name] for name in ("style", "caption", "small", "corner")], ANIMALS)


@pytest.fixture(scope="module")
def codes(pipeline):
    return torch.randint(32, (3, 4, 4), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def asked():
    noise = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
    pictures = [Image.fromarray(picture) for picture in noise]
    return {
        "class_labels": {"class": "cat", "style": [0, "shaded", 1]},
        "text": ["a cat", "a red dog", "dogs"],
        "condition_images": {"small": pictures[0], "corner": pictures[1:]},
    }


@torch.no_grad()
def naive_nats(pipeline, prompts, codes):
    """-ln p of each code, by a forward for each; float64 `(N, L)`."""
    nats = torch.empty(codes.flatten(1).shape, dtype=torch.float64)
    for number, (prompt, of_image) in enumerate(zip(prompts, codes.flatten(1), strict=True)):
        for place, code in enumerate(of_image):
            logits = pipeline.prior(torch.cat([prompt, of_image[:place]])[None]).logits[0, -1].double()
            nats[number, place] = -logits.log_softmax(-1)[code]
    return nats


def test_a_score_takes_the_prompt_of_generate(pipeline, codes, asked, monkeypatch):
    out = pipeline.score(codes=codes, **asked)
    expected = naive_nats(pipeline, prompts_of(pipeline, monkeypatch, **asked), codes)
    assert torch.allclose(out.code_nats.flatten(1), expected, atol=1e-5)
    assert out.likelihood == "class+style+caption+small+corner"
    some = {"class_labels": {"class": [0, 1, 2]}, "text": "a cat"}
    out = pipeline.score(codes=codes, **some)
    null = pipeline.layout.null_prompt().repeat(3, 1)
    assert out.likelihood == "class+caption"
    prompts = prompts_of(pipeline, monkeypatch, **some)
    assert torch.allclose(out.nats, naive_nats(pipeline, prompts, codes).sum(1), atol=1e-4)
    out = pipeline.score(codes=codes)
    assert out.likelihood == "unconditional"
    assert torch.allclose(out.nats, naive_nats(pipeline, null, codes).sum(1), atol=1e-4)


def test_a_score_refuses_what_generate_refuses(parts, segments, pipeline, codes):
    needy = make(parts, [segments["style"], dataclasses.replace(segments["caption"], has_null=False)])
    for pipe, wrong in (
        (needy, {"class_labels": {"style": 0}}),
        (pipeline, {"class_labels": {"style": 0}}),  # the class is dropped with all others only
        (pipeline, {"class_labels": 3}),
        (pipeline, {"class_labels": {"style": "wild"}}),
        (pipeline, {"text": {"words": "a"}}),
        (pipeline, {"class_labels": {"class": 0}, "text": " "}),
        (pipeline, {"class_labels": {"class": 0}, "condition_images": {"small": 3}}),
        (pipeline, {"class_labels": {"class": 0, "style": [0, 1, 2]}, "text": ["a", "b"]}),
    ):
        messages = set()
        for call in (pipe.generate, *(getattr(pipe, name) for name in ("score", "compress"))):
            with pytest.raises(ValueError) as caught:
                call(**wrong) if call == pipe.generate else call(codes=codes, **wrong)
            messages.add(str(caught.value))
        assert len(messages) == 1
    with pytest.raises(ValueError, match="text: received 2 values for 3 images; needs one for all, or one for each"):
        pipeline.score(codes=codes, class_labels={"class": 0}, text=["a", "b"])
    assert needy.score(codes=codes).likelihood == "unconditional"
    assert needy.score(codes=codes, text="a").likelihood == "caption"


def test_a_class_that_is_needed_is_unknown_without_a_prompt(parts, segments, codes):
    style, caption = dataclasses.replace(segments["style"], has_null=False), segments["caption"]
    pipe = make(parts, [style, caption], has_null=False)
    out = pipe.score(codes=codes)
    each = torch.stack([pipe.score(codes=codes, class_labels=name).nats for name in STYLES], 1)
    assert out.likelihood == "marginal" and torch.allclose(out.nats, -each.neg().exp().mean(1).log(), atol=1e-4)
    with pytest.raises(ValueError, match="class_labels: this prior was trained without dropout of 'style' alone"):
        pipe.score(codes=codes, text="a cat")


def test_the_posterior_of_a_named_condition(parts, segments, pipeline, codes):
    known = {"class_labels": {"class": [0, 1, 2]}, "text": "a cat"}
    found = pipeline.class_posterior(codes=codes, condition="style", **known, class_prior=[1, 2, 3])
    nats = [
        pipeline.score(codes=codes, class_labels=known["class_labels"] | {"style": n}, text="a cat").nats
        for n in range(3)
    ]
    joint = torch.tensor([1, 2, 3]) * (-torch.stack(nats, 1)).exp()
    assert torch.allclose(found, joint / joint.sum(1, keepdim=True), atol=1e-5)
    nats = torch.stack([pipeline.score(codes=codes, class_labels={"class": n}).nats for n in range(3)], 1)
    assert torch.allclose(pipeline.class_posterior(codes=codes), (-nats).softmax(1), atol=1e-5)

    alone = make(parts, [segments["style"]])  # the only one needs no name
    expected = alone.class_posterior(codes=codes, condition="style")
    assert torch.equal(alone.class_posterior(codes=codes), expected) and expected.shape == (3, 3)
    several = make(parts, [segments["animal"], segments["style"]])
    for condition in (None, "class", "caption", ["style"]):
        with pytest.raises(ValueError, match=r"condition: received .*; must be one of the .* 'animal', 'style'"):
            several.class_posterior(codes=codes, condition=condition)
    with pytest.raises(ValueError, match="class_labels: received the condition 'style'; its probabilities are asked"):
        several.class_posterior(codes=codes, condition="style", class_labels={"style": 0})
    with pytest.raises(ValueError, match="class_prior: received 'counts', but this pipeline does not record"):
        several.class_posterior(codes=codes, condition="style", class_prior="counts")
    needy = make(parts, [segments["style"], dataclasses.replace(segments["caption"], has_null=False)])
    with pytest.raises(ValueError, match="text: this prior was trained without dropout of 'caption' alone"):
        needy.class_posterior(codes=codes)
    assert needy.class_posterior(codes=codes, text="a cat").shape == (3, 3)


def test_the_bytes_hold_the_prompt(pipeline, codes, asked, monkeypatch):
    pytest.importorskip("constriction")
    data = pipeline.compress(codes=codes.repeat(20, 1, 1), **many(asked, 20))
    monkeypatch.setattr(pipeline, "_tokenizers", None)  # the reader needs no text and no image
    assert torch.equal(pipeline.decompress(data, "codes"), codes.repeat(20, 1, 1))
    monkeypatch.undo()
    header, _ = compressed_file.unpack(data)
    assert (header.version, header.given) == (2, 0b11111)
    text = pipeline.layout.segments[1].num_tokens + 1
    prompt_bits = np.log2(3) + np.log2(3) + 6 * np.log2(text) + 2 * 4 * 5
    expected = 20 * (codes_bits(pipeline, codes, asked, monkeypatch) + 3 * prompt_bits)
    assert 8 * (len(data) - OVERHEAD) == pytest.approx(expected, rel=0.01)


def many(asked, times):
    """The same prompts, again and again."""
    return {
        key: {name: one * times if isinstance(one, list) else one for name, one in value.items()}
        if isinstance(value, dict)
        else value * times
        for key, value in asked.items()
    }


@torch.no_grad()
def codes_bits(pipeline, codes, asked, monkeypatch):
    """-log2 of the probability of the codes among all codes."""
    prompts, flat = prompts_of(pipeline, monkeypatch, **asked), codes.flatten(1)
    logits = pipeline.prior(torch.cat([prompts, flat[:, :-1]], 1)).logits[:, prompts.shape[1] - 1 :, :32].double()
    return -logits.log_softmax(-1).gather(-1, flat[..., None]).sum().item() / np.log(2)


def test_the_command_names_the_best_class_given_the_other_conditions(parts, segments, tmp_path):
    needed = dataclasses.replace(segments["style"], has_null=False)
    pipeline = make(parts, [needed], ANIMALS, has_null=False)
    pipeline.save_pretrained(tmp_path / "pipeline")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    image.save(tmp_path / "image.png")
    asked = {"class": "bee", "style": "drawn"}
    files = {"pipeline": str(tmp_path / "pipeline"), "images": str(tmp_path / "image.png")}
    (line,) = score(load_config(ScoreConfig, overrides={**files, "class_labels": asked}))
    best = pipeline.class_posterior(image, class_labels={"style": "drawn"})
    assert line["nats"] == pytest.approx(pipeline.score(image, asked).nats.item(), abs=1e-3)
    assert line["best_class"] == ANIMALS[best.argmax()] and line["probability"] == pytest.approx(
        best.max().item(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"has_null": False}, {"style": 0}, r"class_labels\['class'\]: .*; it needs class_labels\['class'\]"),
        ({"has_null": False}, {"class": 0, "style": 0}, "text: .*; it needs text$"),
        ({}, None, r"best_class: .*; it needs class_labels\['style'\], text, or best_class false"),
    ],
    ids=["class", "text", "best class"],
)
def test_the_command_says_what_it_needs(parts, segments, fields, given, message):
    needed = [dataclasses.replace(segments[name], has_null=False) for name in ("style", "caption")]
    config = load_config(ScoreConfig, overrides={"pipeline": "p", "images": "i", "class_labels": given})
    with pytest.raises(ConfigError, match=message):
        asked_of(config, make(parts, needed, ANIMALS, **fields))


def test_only_files_with_further_conditions_are_of_the_new_version(parts, segments, pipeline, codes):
    pytest.importorskip("constriction")
    for labels, version, given in ((None, 1, 0), ({"class": 2}, 1, 1), ({"class": 2, "style": 1}, 2, 3)):
        data = pipeline.compress(codes=codes, class_labels=labels)
        header, _ = compressed_file.unpack(data)
        assert (header.version, header.given) == (version, given)
        assert torch.equal(pipeline.decompress(data, "codes"), codes)
    style = make(parts, [segments["style"]])
    assert compressed_file.unpack(style.compress(codes=codes, class_labels="flat"))[0].version == 2
    names = [f"style{number}" for number in range(9)]
    wide = make(parts, [dataclasses.replace(segments["style"], name=name) for name in names])
    with pytest.raises(ValueError, match="conditions: received 'style8'; compressed images can have the first 8"):
        wide.compress(codes=codes, class_labels={"style8": 0})
