"""The presets: the command that lists, prints and copies them; the help of one; the names that lead to them."""

from pathlib import Path

import pytest

import configs
from configs import ConfigError, load_config, run
from configs.presets import PresetsConfig, main, with_keys
from configs.yaml_files import preset_names, preset_of, read_yaml
from pipelines.defaults import STANDARD, UNMASKING
from pipelines.evaluate import EvaluationConfig
from stage1_vqgan import Stage1Config
from stage2_prior import Stage2Config
from tests.test_cli import QUICK_ANSWERS, python

ROOT = Path(configs.__file__).parent
DATA = {"data.dataset": "path/to/images"}


def presets(*words: str) -> None:
    run(PresetsConfig, main, "presets", with_keys(words))


@pytest.mark.parametrize("name", [name for name in preset_names() if name.endswith("/evaluate")])
def test_an_evaluation_takes_the_sampling_defaults_of_the_pipeline(name):
    """A preset that sets them would hide what `tessella tune` has found."""
    assert not read_yaml(name)[0].keys() & {*STANDARD, *UNMASKING}


def refusal(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        presets(*words)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["list"]])
def test_the_list_has_the_first_line_of_every_header(capsys, words):
    presets(*words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    for line in lines:
        name, _, header = line.partition(" ")
        assert len(header) > 20 and f"# {header.strip()}\n" in (ROOT / f"{name}.yaml").read_text()


def test_the_usage_names_the_words(capsys):
    presets("--help")
    assert "usage: presets [list | print NAME | copy NAME PATH]" in capsys.readouterr().out


def test_print_shows_the_file(capsys):
    presets("print", "own/cpu/stage1")
    assert capsys.readouterr().out == (ROOT / "own/cpu/stage1.yaml").read_text()
    presets("print", "own/cpu")
    assert capsys.readouterr().out == "\n".join(path.read_text() for path in sorted((ROOT / "own/cpu").glob("*.yaml")))


def test_a_copy_is_a_configuration_and_nothing_is_overwritten(tmp_path, capsys):
    presets("copy", "own/cpu/stage1", str(tmp_path / "new" / "mine.yaml"))
    presets("copy", "own/cpu", str(tmp_path / "all"))
    mine, stage1 = load_config(Stage1Config, str(tmp_path / "new/mine.yaml"), DATA), tmp_path / "all/stage1.yaml"
    assert mine == load_config(Stage1Config, "own/cpu", DATA) == load_config(Stage1Config, str(stage1), DATA)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["evaluate.yaml", "stage1.yaml", "stage2.yaml"]
    assert capsys.readouterr().out.count(".yaml") == 4
    stage1.write_text("mine")
    (tmp_path / "all/evaluate.yaml").unlink()
    assert f"{stage1} exists, and nothing is overwritten" in refusal(capsys, "copy", "own/cpu", str(tmp_path / "all"))
    assert stage1.read_text() == "mine" and not (tmp_path / "all/evaluate.yaml").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (["prnt", "x"], "did you mean 'print'?"),
        (["print"], "name the preset to print, such as own/cpu/stage1"),
        (["print", "own/cpp"], "did you mean the preset 'own/cpu'?"),
        (["copy", "own/cpu/stage1"], "path: name the file or folder of the copy"),
        (["list", "a", "b", "c"], "'c' follows no --key"),
    ],
)
def test_mistakes(capsys, words, message):
    assert message in refusal(capsys, *words)


def test_the_name_of_a_folder_stands_for_the_preset_of_the_command(tmp_path, monkeypatch):
    for cls, kind in ((Stage1Config, "stage1"), (Stage2Config, "stage2"), (EvaluationConfig, "evaluate")):
        assert load_config(cls, "own/cpu", DATA) == load_config(cls, f"own/cpu/{kind}", DATA)
        assert load_config(cls, "configs/digits/") == load_config(cls, f"digits/{kind}")
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("seed: 1\n")  # a file of this name is meant
    assert preset_of("stage1", "digits") == "digits"
    for name, words in [("own", "own/cpu/stage2"), ("own/cpuu", "the preset 'own/cpu'")]:
        with pytest.raises(ConfigError, match=words):
            read_yaml(preset_of("stage1", name))


def test_help_shows_the_values_of_a_preset_and_the_fields_of_the_model(tmp_path):
    shown = python(["-c", QUICK_ANSWERS, "stage1_vqgan.train", "own/cpu", "--help"], tmp_path).stdout
    assert shown.endswith("heavy modules []\n")
    values = load_config(Stage1Config, "own/cpu", DATA)
    assert "The values are those of own/cpu/stage1." in shown
    assert f"  --max_steps {values.max_steps}\n" in shown and "  --loss.perceptual_weight 0\n" in shown
    assert f"  --model.base_channels {values.model['base_channels']}\n" in shown and "--model.dropout 0.0\n" in shown
    defaults = python(["-c", QUICK_ANSWERS, "stage1_vqgan.train", "--help"], tmp_path).stdout
    assert "  --max_steps (required)\n" in defaults and "  --model.base_channels 128\n" in defaults


def test_help_of_an_unknown_preset_is_a_message(capsys):
    with pytest.raises(SystemExit) as caught:
        run(Stage1Config, pytest.fail, "command", ["own/cpi", "--help"])
    assert caught.value.code == 2 and "did you mean the preset 'own/cpu'?" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["cpu", "64", "128", "256"])
def test_presets_for_own_images_fit_together(size):
    stage1, stage2, evaluation = (
        load_config(cls, f"own/{size}", DATA) for cls in (Stage1Config, Stage2Config, EvaluationConfig)
    )
    assert stage1.output_dir == stage2.tokenizer == evaluation.tokenizer_run
    assert stage2.code_store == evaluation.code_store and stage2.output_dir == evaluation.prior_run
    assert stage1.model["image_size"] == (32 if size == "cpu" else int(size))
    assert bool(stage1.loss.perceptual_weight) == (size != "cpu")
