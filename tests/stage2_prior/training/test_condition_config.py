"""The settings of conditions: nested sections by name, their defaults, and rules across their keys."""

import pytest

from configs import ConfigError, check, load_config
from configs.help_text import help_text
from configs.loader import save_config, to_dict
from stage2_prior import Stage2Config
from stage2_prior.training.condition_config import ConditionConfig

BASE = {
    "tokenizer": "vqgan",
    "code_store": "codes",
    "output_dir": "prior",
    "max_steps": 3,
    "data": {"dataset": "folder"},
    "model": {"model_type": "llama"},
}


def load(**conditions):
    return load_config(Stage2Config, overrides={**BASE, "conditions": conditions})


def test_a_section_for_each_name():
    config = load(text={"kind": "text", "column": "caption"}, small={"transform": "downscale 4", "dropout": 0.2})
    text, small = config.conditions["text"], config.conditions["small"]
    assert (text.max_tokens, text.vocab_size, small.kind) == (16, 1024, "image")
    assert config.segment_dropout == {"small": 0.2}
    assert text.identity() == {"kind": "text", "column": "caption", "max_tokens": 16, "vocab_size": 1024}
    given = load(text={"kind": "text", "column": "caption", "tokenizer": "Qwen/Qwen3-0.6B"}).conditions["text"]
    assert given.identity() == {"kind": "text", "column": "caption", "max_tokens": 16}


def test_files_and_overrides_join(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "conditions: {text: {kind: text, column: a}, style: {kind: class, column: b}}"
    )
    path = str(tmp_path / "config.yaml")
    config = load_config(
        Stage2Config, path, {**BASE, "conditions.text.column": "caption", "conditions.gray.transform": "gray"}
    )
    columns = {name: condition.column for name, condition in config.conditions.items()}
    assert columns == {"text": "caption", "style": "b", "gray": None}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Stage2Config, str(tmp_path / "saved.yaml")) == config == check(config)
    assert to_dict(config)["conditions"]["style"]["kind"] == "class"


def test_without_conditions_nothing_changes():
    config = load_config(Stage2Config, overrides=BASE)
    assert config.conditions == {} and config.segment_dropout == {}


@pytest.mark.parametrize("name", ["codes", "real"])
def test_names_of_other_things_are_refused(name):
    with pytest.raises(ConfigError, match=f"conditions.{name}: the name {name} has another meaning; choose another"):
        load(**{name: {"kind": "class", "column": "a"}})


def test_the_help_describes_a_condition():
    text = help_text(Stage2Config, "train")
    assert "--conditions.NAME.column null" in text and "--conditions.NAME.dropout 0.0" in text


@pytest.mark.parametrize(
    "condition, problem",
    [
        ({"colum": "a", "kind": "text"}, "conditions.c.colum: unknown key; did you mean 'column'?"),
        ({"kind": "sound", "column": "a"}, "c.kind: received 'sound'; must be 'class', 'text' or 'image' or null"),
        ({"column": "a"}, "conditions.c.kind: say what the column holds: class, text or image"),
        ({"kind": "text"}, "conditions.c.column: name the column of the data set that holds the text"),
        ({"kind": "image"}, "conditions.c.column: an image needs either column or transform"),
        ({"column": "a", "transform": "gray"}, "an image needs either column or transform"),
        ({"kind": "class", "column": "a", "max_tokens": 3}, "received 3; a condition of kind class has no max_tokens"),
        ({"kind": "text", "column": "a", "transform": "gray"}, "a condition of kind text has no transform"),
        ({"kind": "text", "column": "a", "tokenizer": "b", "vocab_size": 300}, "tokenizer has its own vocabulary"),
        ({"kind": "text", "column": "a", "vocab_size": 255}, "must be a whole number from 256 to"),
        ({"transform": "blur"}, "conditions.c.transform: received 'blur'; allowed are downscale, gray, edges, mask"),
        ({"transform": "gray", "image_size": 8}, "transform decides the size of the condition image"),
        ({"kind": "image", "column": "a", "image_size": [8]}, "must be the side of a square, or [height, width]"),
        ({"transform": "gray", "dropout": 1.5}, "conditions.c.dropout: received 1.5"),
        (None, "conditions.c: received null; must be a section with keys such as kind, column"),
        ("caption", "conditions.c: received 'caption'; must be a section with keys such as kind, column"),
    ],
)  # fmt: skip
def test_wrong_conditions_are_refused(condition, problem):
    with pytest.raises(ConfigError) as error:
        load(c=condition)
    assert problem in str(error.value)


@pytest.mark.parametrize("name", ["class", "mask", "a b", "../x", "1st"])
def test_wrong_names_are_refused(name):
    with pytest.raises(ConfigError, match="conditions"):
        load(**{name: {"transform": "gray"}})


def test_digits_have_no_columns():
    with pytest.raises(ConfigError, match=r"conditions\.c\.column: received 'a'; 'digits' has no columns"):
        load_config(
            Stage2Config,
            overrides={**BASE, "data": {"dataset": "digits"}, "conditions.c.column": "a", "conditions.c.kind": "image"},
        )


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as error:
        load(a={"kind": "text", "dropout": 2}, b={"transform": "blur"}, c=3)
    assert {problem.key for problem in error.value.problems} >= {
        "conditions.a.dropout", "conditions.a.column", "conditions.b.transform", "conditions.c",
    }  # fmt: skip


def test_a_condition_made_in_python_is_settled():
    config = load_config(Stage2Config, overrides=BASE)
    config.conditions = {"gray": ConditionConfig(transform="gray")}
    assert check(config).conditions["gray"].kind == "image"
