"""Prompts of several conditions: texts, condition images and several classes in `generate`, and their tokenizers."""

import copy
import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models

from configs import ConfigError, run
from pipelines import VQGANPipeline, hub
from pipelines.build import BuildConfig, build
from pipelines.conditions import TextTokenizer, save_conditions
from pipelines.demo.actions import require_classes_only
from pipelines.generate import GenerateConfig, generate
from pipelines.prompts import given_conditions, guidance_groups, require_learnt
from pipelines.score import ScoreConfig, score
from stage1_vqgan import VQGANImageProcessor
from stage2_prior import SamplingOptions, TokenLayout, code_nats
from stage2_prior.condition_text import encode_texts
from tests.prompted import ANIMALS, TEXTS, K, L, make, make_parts, make_segments, prompts_of
from tests.slow import few


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def segments(parts):
    return make_segments(parts)


@pytest.fixture(scope="module")
def pipeline(parts, segments):
    """All of its conditions were dropped together, and each alone."""
    return make(parts, segments.values())


@pytest.fixture(scope="module")
def with_class(parts, segments):
    """A pipeline with the class of a class-only prior before the other conditions."""
    return make(parts, [segments[name] for name in ("style", "caption", "small", "corner")], ANIMALS)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))


@pytest.mark.parametrize("name", ["animal", "class"])
def test_a_prompt_holds_the_tokens_of_each_condition(pipeline, with_class, parts, segments, picture, monkeypatch, name):
    own, small, text = parts
    made = {"animal": pipeline, "class": with_class}[name]
    layout = made.layout
    asked = {"class_labels": {name: ["cat", 0], "style": "drawn"}, "text": ["a cat", "a red dog"]}
    prompts = prompts_of(made, monkeypatch, **asked, condition_images={"small": picture, "corner": picture})
    pixels = VQGANImageProcessor(8, 1)(picture)["pixel_values"]
    with torch.no_grad():
        codes = [one.vqgan.encode(pixels).codes.flatten() for one in (small, own)]
    texts = encode_texts(text.tokenizer, asked["text"], segments["caption"])
    for row, number in enumerate((2, 0)):
        ids = [torch.tensor([number, 1]), texts[row], *codes]
        assert prompts[row].tolist() == (torch.cat(ids) + layout.offsets).tolist()


def test_what_is_not_given_is_null(pipeline, monkeypatch):
    layout = pipeline.layout
    prompts = prompts_of(pipeline, monkeypatch, num_images=2)
    assert prompts.tolist() == [layout.null_prompt().tolist()] * 2


def test_lists_have_one_length_and_single_values_serve_all_images(pipeline, monkeypatch):
    lists = {"class_labels": {"style": [1, 1, 1]}, "text": ["a cat"] * 3}
    one = {"class_labels": {"style": 1}, "text": "a cat"}
    expected = prompts_of(pipeline, monkeypatch, **lists)
    assert expected.shape == (3, pipeline.layout.prompt_length)
    for asked in (one | {"text": ["a cat"] * 3}, lists | {"text": "a cat"}, one | {"num_images_per_label": 3}):
        assert torch.equal(prompts_of(pipeline, monkeypatch, **asked), expected)
    several = prompts_of(pipeline, monkeypatch, text=["a cat", "a dog"], num_images_per_label=2)
    assert torch.equal(several[0], several[1]) and not torch.equal(several[1], several[2])
    assert torch.equal(prompts_of(pipeline, monkeypatch, text="a cat", num_images=2), several[:2])


# {argument: value}, words of the message
REFUSED = {
    "lists": (
        {"class_labels": {"style": [0, 1]}, "text": ["a", "b", "c"]},
        "text: received 3 values, but class_labels['style'] has 2; give lists of one length",
    ),
    "a list of one": ({"class_labels": {"style": [0]}, "text": ["a", "b"]}, "text: received 2 values, but"),
    "no name": (
        {"class_labels": 3},
        "class_labels: received 3; several such conditions need {name: value}; this pipeline knows class_labels "
        "('animal', 'style'), text ('caption'), condition_images ('small', 'corner')",
    ),
    "no such condition": ({"text": {"words": "a"}}, "text: received the condition 'words'; this pipeline knows"),
    "another kind": ({"text": {"style": "flat"}}, "text: received the condition 'style'"),
    "no such class": ({"class_labels": {"style": "wild"}}, "style: received 'wild'; allowed are ids 0 to 2 or names"),
    "no names": ({"text": {}}, "text: received an empty dictionary; this pipeline knows"),
    "nothing for a name": ({"class_labels": {"style": None}}, "style: received None; allowed are ids 0 to 2"),
    "no texts": ({"text": []}, "text: received an empty list"),
    "blank text": ({"text": ["a", " "]}, "text: received ' '; must be text that is not empty"),
    "number for a text": ({"text": 3}, "text: received 3; must be text"),
    "text for an image": ({"condition_images": {"small": "cat.png"}}, "condition_images['small']: images[0]: "),
    "no images": ({"condition_images": {"small": []}}, "condition_images['small']: received an empty list"),
    "count of a list": (
        {"text": ["a", "b"], "num_images": 4},
        "num_images: received 4; cannot be given with text (use num_images_per_label)",
    ),
    "two counts": (
        {"text": "a", "num_images": 4, "num_images_per_label": 2},
        "num_images: received 4; cannot be given with num_images_per_label",
    ),
    "guidance by nothing": (
        {"guidance_scale": 2.0},
        "guidance_scale: received 2.0; guidance needs class_labels['animal'] or class_labels['style'] or text or",
    ),
    "guidance by what is not given": (
        {"text": "a", "guidance_scale": {"small": 2.0}},
        "guidance_scale: received the condition 'small'; guidance needs condition_images['small'] (or use 1.0)",
    ),
    "guidance by an unknown name": (
        {"text": "a", "guidance_scale": {"caption+words": 2.0}},
        "guidance_scale: received the condition 'caption+words'; allowed are 'animal', 'style', 'caption', 'small', "
        "'corner', or several joined by +",
    ),
    "scales of other prompts": (
        {"text": ["a", "b"], "guidance_scale": {"caption": [2.0, 3.0, 4.0]}},
        "guidance_scale: received 3 values, but text has 2",
    ),
    "lists of scales": (
        {"text": "a", "class_labels": {"style": 1}, "guidance_scale": {"caption": [2.0, 3.0], "style": [2.0] * 3}},
        "guidance_scale: received scales for [2, 3] images; give lists of one length",
    ),
    "an empty list of scales": ({"text": "a", "guidance_scale": {"caption": []}}, "guidance_scale: received {'"),
    "no scales": ({"text": "a", "guidance_scale": {}}, "guidance_scale: received {}; must be a number"),
    "a scale of text": ({"text": "a", "guidance_scale": {"caption": "x"}}, "guidance_scale: received 'x'; allowed is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_prompt_can_be_made_of_is_refused(pipeline, case):
    arguments, words = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        pipeline.generate(**arguments, output_type="codes")
    assert words in str(caught.value)


def test_a_class_only_pipeline_names_what_it_knows(tiny_pipeline):
    for arguments in ({"text": "a"}, {"condition_images": [0]}, {"class_labels": {"style": 1}}):
        with pytest.raises(ValueError, match=r"this pipeline knows class_labels \('class'\)$"):
            tiny_pipeline.generate(**arguments)


# Which conditions have a null token of their own, whether all were dropped together; what is asked; the message
LEARNT = {
    "nothing": (["caption"], False, {}, "class_labels['style']: this prior was trained without dropout of 'style'"),
    "all": ([], True, {}, None),
    "each": (["style", "caption"], False, {}, None),
    "one": (["caption"], False, {"class_labels": 0}, None),
    "the other": (["caption"], True, {"text": "a"}, "class_labels: this prior was trained without dropout of 'style'"),
    "guided by all": (["style", "caption"], False, {"text": "a", "guidance_scale": 2.0}, None),
    "guided by all together": ([], True, {"class_labels": 0, "text": "a", "guidance_scale": 2.0}, None),
    "guided by one": (["caption"], True, {"class_labels": 0, "text": "a", "guidance_scale": {"caption": 2.0}}, None),
    "guided by the other": (
        ["caption"],
        True,
        {"class_labels": 0, "text": "a", "guidance_scale": {"style": 2.0}},
        "guidance_scale: this prior was trained without dropout of 'style' alone",
    ),
    "guided by all, none dropped together": (
        ["caption"],
        False,
        {"class_labels": 0, "text": "a", "guidance_scale": 2.0},
        "guidance_scale: this prior was trained without dropout of 'style' alone",
    ),
    "the rest": (["style"], True, {"class_labels": 0, "text": "a", "guidance_scale": {"style+caption": 2.0}}, None),
}


@pytest.mark.parametrize("case", LEARNT)
def test_only_null_tokens_that_training_has_seen_are_used(segments, case):
    own_null, together, arguments, words = LEARNT[case]
    chosen = tuple(dataclasses.replace(segments[name], has_null=name in own_null) for name in ("style", "caption"))
    layout = TokenLayout(K, (), (4, 4), 4, "fingerprint", has_null=together, segments=chosen)
    scale, groups = guidance_groups(layout, arguments.get("guidance_scale", 1.0))
    asked = {key: value for key, value in arguments.items() if key != "guidance_scale"}
    given = [one.segment.name for one in given_conditions(layout, **asked)]
    options = SamplingOptions(guidance_scale=scale)
    if words is None:
        require_learnt(layout, given, options, groups)
        return
    with pytest.raises(ValueError) as caught:
        require_learnt(layout, given, options, groups)
    assert words.replace("['style']", "") in str(caught.value)


def test_the_class_without_dropout_of_its_own_says_how_it_gets_one(with_class):
    asked = {"class_labels": {"class": 0, "style": 1}, "guidance_scale": {"class": 2.0}}
    for arguments in (asked, {"text": "a"}):
        with pytest.raises(ValueError, match=r"'class' alone \(the class of data.label_column has none; .* conditions"):
            with_class.generate(**arguments)


@torch.no_grad()
def greedy_naively(pipeline, prompt, groups, scales):
    """Forwards of whole sequences, one for each group at each code: c + Σ (s - 1)·(c - u)."""
    codes = torch.empty(0, dtype=torch.int64)
    for _ in range(L):
        nulls = [pipeline.layout.null_prompt(names) for names in groups]
        rows = [prompt, *(prompt.where(null < 0, null) for null in nulls)]
        logits = [pipeline.prior(torch.cat([row, codes])[None]).logits[0, -1, :K].double() for row in rows]
        guided = logits[0] + sum((s - 1) * (logits[0] - u) for s, u in zip(scales, logits[1:], strict=True))
        codes = torch.cat([codes, guided.argmax()[None]])
    return codes


@pytest.mark.parametrize(
    "scale, groups",
    [
        (3.0, [None]),
        pytest.param({"style": 3.0}, [["style"]], marks=pytest.mark.slow),
        pytest.param({"caption": 3.0, "style": 1.0}, [["caption"]], marks=pytest.mark.slow),
        ({"style": 3.0, "caption+small": 2.0}, [["style"], ["caption", "small"]]),
    ],
)
def test_guidance_by_named_conditions(pipeline, picture, monkeypatch, scale, groups):
    asked = {"class_labels": {"style": [0, 1]}, "text": "a cat", "condition_images": {"small": picture}}
    prompts = prompts_of(pipeline, monkeypatch, **asked)
    out = pipeline.generate(**asked, guidance_scale=scale, temperature=0.0, output_type="codes")
    scales = [scale] if isinstance(scale, float) else [value for value in scale.values() if value != 1]
    for prompt, codes in zip(prompts, out.codes, strict=True):
        assert codes.flatten().tolist() == greedy_naively(pipeline, prompt, groups, scales).tolist()


def test_each_prompt_has_its_own_scales_of_named_conditions(pipeline):
    """Images with one group, none, both, and the other one: each has the codes and the formula of its own request."""
    scales = {"caption": [3.0, 1.0, 2.0, 1.0], "style+animal": [1.0, 1.0, 4.0, 2.5]}
    asked = {"class_labels": {"style": 0, "animal": 1}, "text": TEXTS}
    options = {"guidance_schedule": "linear", "output_type": "codes"}
    settings = {"num_images_per_label": 2, "batch_size": 3, **options}
    out = pipeline.generate(**asked, guidance_scale=scales, seed=0, **settings)
    for n in range(8):
        own = {name: values[n // 2] for name, values in scales.items()}
        alone = pipeline.generate(**asked | {"text": TEXTS[n // 2]}, guidance_scale=own, seed=n, **options)
        assert torch.equal(out.codes[n], alone.codes[0]) and out.prompts[n]["guidance_scale"] == own
        assert torch.equal(pipeline.generate(**out.prompts[n], seed=n, **options).codes, alone.codes)
    mixed = pipeline.generate(**asked, guidance_scale=scales | {"style+animal": 2.5}, seed=0, **settings)
    assert torch.equal(mixed.codes[6:], out.codes[6:]) and not torch.equal(mixed.codes[2:4], out.codes[2:4])


def test_the_best_by_class_keeps_the_other_conditions(with_class):
    asked = {"class_labels": {"class": "cat", "style": "flat"}, "text": "a red cat", "output_type": "codes"}
    out = with_class.generate(**asked, seed=7, best_of=5, best_by="class")
    alone = with_class.generate(**asked, seed=out.seeds[0])
    assert torch.equal(out.codes, alone.codes) and out.seeds != [7]
    layout = with_class.layout
    prompt = layout.null_prompt()
    prompt[1] = layout.first_tokens["style"]
    ids = encode_texts(with_class.conditions["caption"].tokenizer, ["a red cat"], layout.segments[1])
    prompt[layout.places["caption"]] = ids[0] + layout.first_tokens["caption"]
    likelihood = []
    for number in range(3):
        prompt[0] = K + number
        likelihood.append(-code_nats(with_class.prior, prompt[None], alone.codes.flatten(1)).double().sum())
    assert out.scores[0] == pytest.approx(torch.stack(likelihood).log_softmax(0)[2].item(), rel=1e-4)


def test_with_num_images_each_image_has_a_scale(pipeline):
    asked = {"text": "a cat", "seed": 0, "output_type": "codes", "guidance_scale": {"caption": [1.0, 5.0]}}
    expected = pipeline.generate(**asked | {"text": ["a cat"] * 2})
    assert torch.equal(pipeline.generate(**asked, num_images=2).codes, expected.codes)
    with pytest.raises(ValueError, match="guidance_scale: received a list of 2 for 3 images"):
        pipeline.generate(**asked, num_images=3)


def test_the_output_names_what_was_asked_of_each_image(with_class, picture):
    pictures = [picture, picture.rotate(90)]
    asked = {"class_labels": {"class": ["cat", "ant"]}, "text": "a dog", "condition_images": {"corner": pictures}}
    out = with_class.generate(**asked, num_images_per_label=2, guidance_scale={"caption": 2.0}, seed=5)
    assert out.labels == ["cat", "cat", "ant", "ant"] and out.images[0].size == (16, 16)
    found = {
        "class_labels": {"class": "ant"},
        "text": {"caption": "a dog"},
        "condition_images": {"corner": pictures[1]},
    }
    assert out.prompts[2] == found
    again = with_class.generate(**out.prompts[2], seed=out.seeds[2], guidance_scale={"caption": 2.0})
    assert torch.equal(again.codes[0], out.codes[2])


def test_a_long_text_loses_its_end_and_one_without_tokens_is_refused(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        pipeline.generate(text="a red cat and a blue dog", output_type="codes")
    assert "text: a text has" in caplog.text and "the first 6" in caplog.text


def test_a_stock_prior_writes_the_same_codes_without_this_package(parts, segments, monkeypatch):
    pipeline = make(parts, [segments["caption"]], ANIMALS)
    prompts = prompts_of(pipeline, monkeypatch, text=TEXTS, class_labels=0)
    expected = pipeline.generate(text=TEXTS, class_labels=0, temperature=0.0, output_type="codes").codes
    written = pipeline.prior.generate(prompts, do_sample=False)[:, prompts.shape[1] :]
    assert torch.equal(written, expected.flatten(1))


def test_a_text_without_known_tokens_is_refused(segments):
    tokenizer = Tokenizer(models.BPE({"c": 0, "a": 1, "t": 2}, []))
    with pytest.raises(ValueError, match="text: received 'dog'; the tokenizer has no token for it"):
        TextTokenizer(tokenizer.to_str()).ids(["cat", "dog"], segments["caption"], "text")


def test_the_condition_images_of_a_prior_may_have_another_dtype(parts, segments, picture):
    own, small, text = (copy.deepcopy(part) for part in parts)
    pipeline = make((own, small, text), [segments["small"]]).to(torch.float64)
    assert small.vqgan.dtype == torch.float64
    assert len(pipeline.generate(condition_images=[picture] * 2, output_type="codes")) == 2


# ---------------------------------------------------------------------- saving and loading


@pytest.fixture(scope="module")
def saved(with_class, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    with_class.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


def test_a_loaded_pipeline_makes_the_same_images(saved, with_class, picture):
    loaded = VQGANPipeline.from_pretrained(saved)
    loaded.set_progress_bar_config(disable=True)
    asked = {"class_labels": {"class": 0, "style": 1}, "text": "a dog", "condition_images": {"small": picture}}
    options = {"guidance_scale": {"caption": 2.0}, "seed": 3, "output_type": "codes"}
    expected = with_class.generate(**asked, **options).codes
    assert torch.equal(loaded.generate(**asked, **options).codes, expected)
    assert sorted(loaded.components["conditions"]) == ["caption", "small"]
    assert "conditions: style (3 classes), caption (text of 6 tokens out of 277), small (" in repr(loaded)


def test_the_folder_holds_each_tokenizer(saved):
    assert [path.name for path in (saved / "conditions" / "caption").iterdir()] == ["tokenizer.json"]
    names = {path.name for path in (saved / "conditions" / "small").iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "checksums.json"}
    index = json.loads((saved / "model_index.json").read_text())
    assert [segment["name"] for segment in index["token_layout"]["segments"]] == ["style", "caption", "small", "corner"]


def test_the_card_shows_how_to_ask(saved):
    card = (saved / "README.md").read_text()
    assert 'text={"caption": "…"}' in card and 'class_labels={"class": 0, "style": 0}' in card
    assert (
        "| Prompt | places 2 to 7: caption (text of 6 tokens out of 277); tokens" in card
        and "pipeline_tag: text-to-image" in card
    )
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def damage_text(folder):
    path = folder / "conditions" / "caption" / "tokenizer.json"
    path.write_text(path.read_text().replace("dog", "cow"))
    return "conditions.caption: received the tokenizer .*, but the prior was trained with"


def remove_text(folder):
    shutil.rmtree(folder / "conditions" / "caption")
    return "conditions/caption/tokenizer.json"


def cut_text(folder):
    (folder / "conditions" / "caption" / "tokenizer.json").write_text("{")
    return "conditions.caption: received the tokenizer"


def pickle_text(folder):
    (folder / "conditions" / "caption" / "tokenizer.json").rename(folder / "conditions" / "caption" / "tokenizer.pkl")
    return "conditions/caption/tokenizer.json"


def remove_images(folder):
    shutil.rmtree(folder / "conditions" / "small")
    return "conditions/small"


def pickle_images(folder):
    weights = folder / "conditions" / "small" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    return "conditions/small"


def exchange_images(folder):
    shutil.rmtree(folder / "conditions" / "small")
    shutil.copytree(folder / "vqgan", folder / "conditions" / "small")
    return "conditions.small: received the tokenizer"


def flip_a_bit(folder):
    path = folder / "conditions" / "small" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "conditions/small/model.safetensors: the contents of this file have changed"


DAMAGES = [damage_text, remove_text, cut_text, pickle_text, remove_images, pickle_images, exchange_images, flip_a_bit]


@pytest.mark.parametrize("damage", few(DAMAGES, damage_text, pickle_images, exchange_images))
def test_a_missing_or_foreign_tokenizer_is_refused(folder, damage):
    words = damage(folder)
    with pytest.raises((OSError, ValueError), match=words):
        VQGANPipeline.from_pretrained(folder)


def test_conditions_of_the_constructor_are_checked(parts, segments):
    own, _, text = parts
    for conditions, words in (
        ({}, "conditions: the tokenizer of 'caption' is missing"),
        ({"caption": text, "corner": own}, "conditions: received a tokenizer of 'corner'; this prior needs 'caption'"),
        ({"caption": own}, "conditions.caption: received .*; must be of type TextTokenizer"),
    ):
        with pytest.raises(ValueError, match=words):
            make(parts, [segments["caption"], segments["corner"]], conditions=conditions)
    with pytest.raises(ValueError, match=r"conditions\.small: received the tokenizer"):
        make(parts, [segments["small"]], conditions={"small": own})
    wrong = [dataclasses.replace(segments[name], num_tokens=16) for name in ("caption", "corner")]
    for segment in wrong:
        with pytest.raises(ValueError, match=r"token_layout\.segments\..*: received 16 tokens, but its tokenizer has"):
            make(parts, [segment])
    larger = dataclasses.replace(segments["corner"], image_shape=(12, 12))
    with pytest.raises(ValueError, match=r"condition_images: the tokenizer makes 9 codes of such images, .* has 4"):
        make(parts, [larger]).generate(condition_images=Image.new("L", (8, 8)))


def test_saving_over_another_prior_removes_its_tokenizers(folder, parts, segments):
    make(parts, [segments["caption"]]).save_pretrained(folder)
    assert [path.name for path in (folder / "conditions").iterdir()] == ["caption"]
    assert VQGANPipeline.from_pretrained(folder).layout.prompt_length == 6


def test_build_takes_the_tokenizers_from_the_prior(with_class, parts, tmp_path):
    own, _, _ = parts
    own.vqgan.save_pretrained(tmp_path / "vqgan")
    own.image_processor.save_pretrained(tmp_path / "vqgan")
    with_class.prior.save_pretrained(tmp_path / "prior")
    with_class.layout.save_pretrained(tmp_path / "prior")
    names = {"tokenizer": str(tmp_path / "vqgan"), "prior": str(tmp_path / "prior")}
    config = BuildConfig(**names, output_dir=str(tmp_path / "pipeline"))
    with pytest.raises(ConfigError, match=r"prior: received .*; a tokenizer of its conditions cannot be loaded"):
        build(config)
    save_conditions(tmp_path / "prior", with_class.conditions)
    build(config)
    loaded = VQGANPipeline.from_pretrained(tmp_path / "pipeline")
    assert {name: one.fingerprint for name, one in loaded.conditions.items()} == {
        name: one.fingerprint for name, one in with_class.conditions.items()
    }


def test_an_upload_holds_the_tokenizers(folder, tmp_path, monkeypatch):
    (folder / "conditions" / "caption" / "secret.pkl").write_text("mine")
    monkeypatch.setattr(hub, "push_folder", lambda repo, write, stale, private: write(tmp_path / "upload", repo))
    (tmp_path / "upload").mkdir()
    hub.push_saved("me/model", folder, None)
    sent = {path.relative_to(tmp_path / "upload").as_posix() for path in (tmp_path / "upload").rglob("*")}
    assert {"conditions/caption/tokenizer.json", "conditions/small/model.safetensors"} < sent
    assert not any(name.endswith(".pkl") for name in sent)
    VQGANPipeline.from_pretrained(tmp_path / "upload")


def test_the_demo_app_refuses_what_it_has_no_inputs_for(with_class, tiny_pipeline):
    require_classes_only(tiny_pipeline)
    with pytest.raises(
        ConfigError, match=r"further conditions, style \(3 classes\), .*; the page asks for classes only"
    ):
        require_classes_only(with_class)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def command(saved, tmp_path, monkeypatch, capsys, picture):
    """Runs the command in a folder with two pictures; returns its lines, or what it says when it refuses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    picture.save("pictures/a.png")
    picture.rotate(90).save("pictures/b.png")

    def start(*arguments):
        try:
            run(GenerateConfig, generate, "command", [str(saved), *arguments, "--device=cpu"])
        except SystemExit:
            return capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return start


def test_the_command_generates_from_all_conditions(command, with_class, picture):
    options = ["--class_labels.class=cat,ant", "--class_labels.style=1", "--text=a dog", "--seed=4"]
    options += ["--condition_images.small=pictures", "--guidance_scale.caption=2", "--output_dir=out", "--grid=a.png"]
    lines = command(*options)
    expected = with_class.generate(
        class_labels={"class": ["cat", "ant"], "style": 1},
        text="a dog",
        condition_images={"small": [picture, picture.rotate(90)]},
        guidance_scale={"caption": 2.0},
        seed=4,
    )
    assert [line["file"] for line in lines] == ["out/cat_drawn_a_dog_0004.png", "out/ant_drawn_a_dog_0005.png"]
    assert lines[1]["label"] == "ant" and lines[1]["condition_images"] == {"small": "pictures/b.png"}
    for line, image in zip(lines, expected.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(line["file"])), np.asarray(image))
    again = [f"--{key}={json.dumps(lines[1][key])}" for key in ("class_labels", "text", "condition_images", "seed")]
    (line,) = command(*again, "--guidance_scale.caption=2", "--output_dir=again")
    assert np.array_equal(np.asarray(Image.open(line["file"])), np.asarray(expected.images[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class_labels.style=wild"], "style: received 'wild'; allowed are ids 0 to 2"),
        pytest.param(
            ["--class_labels=1"],
            "class_labels: received 1; several such conditions need {name: value}",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--text.words=a"], "text: received the condition 'words'; this pipeline knows", marks=pytest.mark.slow
        ),
        (["--condition_images.small=nowhere"], "condition_images: received 'nowhere'; there is no such file or folder"),
        (["--condition_images.small=pictures", "--text=[a, b, c]"], "condition_images['small']: received 2 values"),
        pytest.param(
            ["--text=a", "--guidance_scale.words=2"],
            "guidance_scale: received the condition 'words'",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_mistakes_of_the_command_are_messages(command, arguments, message):
    assert message in command(*arguments, "--grid=a.png")


@pytest.mark.slow
def test_the_command_score_takes_a_class_of_each_condition(saved, tmp_path, picture, capsys, with_class):
    picture.resize((16, 16)).save(tmp_path / "a.png")
    options = [f"--images={tmp_path / 'a.png'}", "--device=cpu", "--best_class=false"]
    labels = ["--class_labels.class=cat", "--class_labels.style=1"]
    run(ScoreConfig, score, "command", [str(saved), *options, *labels])
    expected = with_class.score(Image.open(tmp_path / "a.png"), {"class": "cat", "style": "drawn"})
    assert json.loads(capsys.readouterr().out)["nats"] == pytest.approx(expected.nats.item(), abs=1e-3)
    for wrong, message in (
        ("--class_labels=cat", "class_labels: received 'cat'; several such conditions need {name: value}"),
        ("--class_labels.style=wild", "style: received 'wild'; allowed are ids 0 to 2"),
        ("--class_labels.style=1,2", "class_labels['style']: received 2 values; give one"),
        ("--class_labels.style=1", "class_labels['class']: this prior was trained without dropout of 'class' alone"),
        ("--text=[a, b]", "text: received 2 values; give one for all images; score() of the pipeline takes a list"),
    ):
        with pytest.raises(SystemExit):
            run(ScoreConfig, score, "command", [str(saved), *options, wrong])
        assert message in capsys.readouterr().err


def test_a_pipeline_without_the_class_does_not_call_itself_unconditional(pipeline, with_class, picture):
    assert "\n  classes: " not in repr(pipeline) and "conditions: animal (3 classes)" in repr(pipeline)
    assert "\n  classes: 3 " in repr(with_class)
    with pytest.raises(
        ValueError, match=r"class_labels: received 'flat'; several such conditions need \{name: value\}"
    ):
        pipeline.score(picture.convert("RGB"), "flat")
