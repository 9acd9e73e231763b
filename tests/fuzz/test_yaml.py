"""YAML files: hostile texts and damaged presets are refused in our words, or give a configuration that can be saved."""

from pathlib import Path

import pytest

from configs import ConfigError, load_config, parse_arguments, save_config
from configs.yaml_files import MOST_CHARACTERS, parse_yaml, preset_names
from pipelines.evaluation.config import EvaluationConfig
from stage1_vqgan import Stage1Config
from stage2_prior import Stage2Config
from tests.fuzz.harness import cases, damaged, generator, limits, outcome

CLASSES = {"stage1": Stage1Config, "stage2": Stage2Config, "evaluate": EvaluationConfig}
PRESETS = Path(__file__).parents[2] / "configs"


def bomb(first: str, following: str, levels: int = 12) -> str:
    """A short text whose value doubles ten times or more: every level repeats the one before ten times."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {following.format(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, levels)]
    return "\n".join(lines)


# One line, which may stand for any value: 10^12 values, if every alias is written out.
BOMB = "{" + bomb("[x]", "[{}]").replace("\n", ", ") + "}"

# text, words of the message
HOSTILE = {
    "number as key": ("1: 2", "the key 1; keys must be words"),
    "number as a nested key": ("model: {1: 2}", "the key 1; keys must be words"),
    "null as key": ("null: 2", "the key null"),
    "true as key": ("true: 3", "the key true"),
    "empty key": ("?\n: 3", "the key null"),
    "infinity as key": (".inf: 3", "the key .inf"),
    "list as key": ("[a]: 2", "a list or section as key"),
    "section as key": ("{a: b}: 2", "a list or section as key"),
    "long list as key": ("? - a\n  - b\n: 3", "a list or section as key"),
    "alias of a list as key": ("a: &a [1]\n*a : 2", "a list or section as key"),
    "number without digits": ("!!int ''", "a tag"),
    "float without digits": ("a: !!float ''", "a tag"),
    "number of words": ("a: !!int words", "a tag"),
    "boolean of a number": ("a: !!bool 3", "a tag"),
    "date of words": ("a: !!timestamp words", "a tag"),
    "binary": ("a: !!binary '='", "a tag"),
    "set": ("!!set {a}", "a tag"),
    "ordered map": ("a: !!omap [1]", "a tag"),
    "pairs": ("a: !!pairs [1]", "a tag"),
    "python object": ("a: !!python/object/apply:os.system [id]", "a tag"),
    "own tag": ("%TAG ! tag:yaml.org,2002:\n---\na: !int ''", "a tag"),
    "bomb of lists": (bomb("[x, x]", "[{}]"), "more than 10,000 values"),
    "bomb as a value": (f"model: {BOMB}", "more than 10,000 values"),
    "bomb of sections": (bomb("{x: 1}", "{{l: [{}]}}"), "more than 10,000 values"),
    "bomb of merged sections": (bomb("{x: 1}", "{{<<: [{}]}}"), "more than 10,000 values"),
    "list in itself": ("&a [*a]", "an alias inside of the value"),
    "section in itself": ("a: &a {b: {c: *a}}", "an alias inside of the value"),
    "section merged into itself": ("a: &a {<<: *a}", "an alias inside of the value"),
    "merged number": ("a: {<<: 3}", "expected a mapping"),
    "5,000 digits": (f"a: {'9' * 5000}", "a number of 5,000 digits"),
    "deep": ("a: " + "[" * 5000, "nested too deeply"),
    "deep sections": ("{a: " * 5000, "nested too deeply"),
    "deep lines": ("- " * 5000, "nested too deeply"),
    "many values": (f"a: [{'1,' * 20_000}]", "more than 10,000 values"),
    "long": (f"a: '{'x' * MOST_CHARACTERS}'", "it has more than 100,000 characters"),
    "NUL": ("a: \0", "a control character"),
    "escape": ("a: \x1b[2J", "a control character"),
    "half a character": ("a: \udcff", "a byte that is not UTF-8"),
    "two documents": ("a: 1\n---\nb: 2", "a second document"),
    "unknown alias": ("a: *b", "undefined alias"),
    "version": ("%YAML 9.1\n---\na: 1", "incompatible YAML document"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_text_is_refused_before_its_values_are_built(case):
    text, words = HOSTILE[case]
    with limits(), pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert words in str(caught.value) and len(str(caught.value)) < 200
    _, overrides, (problem,) = parse_arguments(["--model", text])  # values of a command line have the same reader
    assert not overrides and words in problem.message and len(str(problem)) < 300 and "\x1b" not in str(problem)


def test_numbers_are_read_as_they_are_written():
    """YAML 1.1 would read 010 as 8, 1:30 as 90, 1_0 as 10, 0x10 as 16, and a date."""
    written = "[010, 1:30, 1_0, 0x10, 0b1, 2024-01-01, no, 1.2.3, =, 10, +5, -0, 1e3, 1E-3, .5, 5., -1.5e+2, ~, 'null']"
    text = ["010", "1:30", "1_0", "0x10", "0b1", "2024-01-01", "no", "1.2.3", "="]
    numbers = [10, 5, 0, 1000.0, 0.001, 0.5, 5.0, -150.0]
    assert parse_yaml(written) == ([*text, *numbers, None, "null"], [])
    assert [type(value) for value in parse_yaml(written)[0][9:17]] == [int] * 3 + [float] * 5


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + (PRESETS / "digits/stage1.yaml").read_bytes())
    assert load_config(Stage1Config, str(tmp_path / "c.yaml")) == load_config(Stage1Config, "digits/stage1")


def test_of_an_endless_file_only_the_beginning_is_read(tmp_path):
    with open(tmp_path / "c.yaml", "wb") as file:
        file.truncate(2**40)  # takes no space on disk
    with limits(), pytest.raises(ConfigError, match="it has more than 100,000 characters"):
        load_config(Stage1Config, str(tmp_path / "c.yaml"))


def test_an_override_changes_one_of_two_sections_that_share_an_alias(tmp_path):
    text = (PRESETS / "digits/stage2.yaml").read_text()
    (tmp_path / "c.yaml").write_text(f"{text}\ntraining_arguments: &a {{lr_scheduler_kwargs: &b {{}}}}\nlora: *b\n")
    wanted = {"lora.alpha": 8, "lora.r": 4, "model_name_or_path": "x"}
    assert load_config(Stage2Config, str(tmp_path / "c.yaml"), wanted).training_arguments == {"lr_scheduler_kwargs": {}}


def test_text_that_looks_like_a_number_survives_saving(tmp_path):
    for text in ["1e3", "1.", "010", "null", "true", "no", "2024-01-01", "0x10", "1:30", "~", "<<", "=", "- a", "a: b"]:
        config = load_config(Stage1Config, "digits/stage1", {"output_dir": text})
        save_config(config, tmp_path / "config.yaml")
        assert load_config(Stage1Config, str(tmp_path / "config.yaml")) == config


SNIPPETS = [BOMB] * 4 + [text for text, _ in HOSTILE.values() if len(text) < 2000]
SNIPPETS += ["&a ", "*a", "<<: *a", "\t", "? ", "! ", ": ", "- ", "|\n", ">-\n", "---\n", "[true, 1]", *"%`@{]'\""]
SNIPPETS += ["1e400", ".nan", "-.inf", "9" * 20, "true", "null", "\ufeff", "\u202e", "\x85", "é"]


def damaged_preset(number: int) -> tuple[type, bytes]:
    """A preset with hostile snippets, exchanged values, moved lines or damaged bytes."""
    draw = generator("yaml", number)
    name = draw.choice(preset_names())
    data = (PRESETS / f"{name}.yaml").read_bytes()
    for _ in range(draw.choice([1, 1, 2, 4])):
        kind = draw.randrange(4)
        lines = data.decode(errors="surrogateescape").split("\n")
        place = draw.randrange(len(lines))
        snippet = draw.choice(SNIPPETS)
        if kind == 0:
            data = damaged(data, draw)
            continue
        if kind == 1:
            key, colon, _ = lines[place].partition(":")
            lines[place] = f"{key}{colon} {snippet}"
        elif kind == 2:
            column = draw.randrange(len(lines[place]) + 1)
            lines[place] = lines[place][:column] + snippet + lines[place][column:]
        else:
            lines.insert(draw.randrange(len(lines)), lines[place])
        data = "\n".join(lines).encode(errors="surrogatepass")
    kind = next(kind for start, kind in CLASSES.items() if name.rpartition("/")[2].startswith(start))
    return kind, data


@cases(short=60, long=440)
def test_a_damaged_preset_is_refused_or_can_be_saved(numbers, tmp_path):
    load_config(Stage2Config, "digits/stage2")  # imports transformers, which takes seconds
    for number in numbers:
        kind, data = damaged_preset(number)
        (tmp_path / "c.yaml").write_bytes(data)
        found = outcome(lambda kind=kind: load_config(kind, str(tmp_path / "c.yaml")), (ConfigError,), tmp_path)
        if isinstance(found, ConfigError):
            assert all(len(line) < 500 and line.isprintable() for line in str(found).split("\n"))
        else:
            save_config(found, tmp_path / "again.yaml")
            assert load_config(kind, str(tmp_path / "again.yaml")) == found
