"""Tokens and passwords: refused in every configuration, and never shown or written."""

import pytest

from configs import ConfigError, Problem, check, load_config, run, save_config
from configs.problems import shown
from configs.secrets import names_secret, redacted
from stage1_vqgan import Stage1Config
from stage2_prior import Stage2Config
from tests.fuzz.test_command_lines import COMMANDS, KEYS

TOKEN = "hf_" + "aB3dE5gH7j" * 4
ADDRESS = "https://me:hunter2@host/images"

# Arguments after those of stage 2, and the key of the message.
PLANTED = {
    "token": (["--training_arguments.hub_token=hunter2"], "training_arguments.hub_token"),
    "token of old": (["--training_arguments.push_to_hub_token", "hunter2"], "training_arguments.push_to_hub_token"),
    "token in a section": (["--training_arguments={hub_token: hunter2}"], "training_arguments.hub_token"),
    "token deep in a section": (["--model={a: [{wandb_api_key: hunter2}]}"], "model.a.wandb_api_key"),
    "key that does not exist": (["--Password=hunter2"], "Password"),
    "value that is no YAML": (["--secret", "[hunter2"], "secret"),
    "section that is no YAML": (["--training_arguments={hub_token: hunter2"], "training_arguments"),
    "words after a secret": (["--password", "a", "hunter2"], "password"),
    "secret without a value": (["--access_key"], "access_key"),
    "value": ([f"--output_dir={TOKEN}"], "output_dir"),
    "value of a wrong type": ([f"--max_steps={TOKEN}"], "max_steps"),
    "value in a list": ([f"--report_to=[{TOKEN}]"], "report_to"),
    "part of a value": ([f"--model.x=see-{TOKEN}"], "model.x"),
    "password in an address": ([f"--data.dataset={ADDRESS}"], "data.dataset"),
    "value that is no YAML, of another key": ([f"--tokenizer=[{TOKEN}"], "tokenizer"),
    "stray": ([TOKEN], ""),
    "key without a name": (["--", TOKEN], ""),
    "section of a single value": ([f"--tokenizer={TOKEN}", "--tokenizer.x=3"], "tokenizer"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_secret_is_refused_and_not_repeated(case, tmp_path, monkeypatch, capsys):
    arguments, key = PLANTED[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        run(Stage2Config, pytest.fail, "command", ["digits/stage2", *arguments])
    shown = "".join(capsys.readouterr())
    assert exited.value.code == 2 and f"- {key}" in shown
    assert "hunter2" not in shown and TOKEN[:12] not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_secret_in_its_file(command, tmp_path):
    kind, _ = COMMANDS[command]
    key = KEYS[kind][0]
    for text in (f"{key}: {TOKEN}", f"{key}: {ADDRESS}", "hub_token: hunter2"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(kind, str(tmp_path / "c.yaml"))
        (problem,) = caught.value.problems
        assert problem.key in (key, "hub_token")
        assert "log in with `hf auth login`, or set HF_TOKEN" in problem.message
        assert "hunter2" not in str(caught.value) and TOKEN not in str(caught.value)


def test_a_secret_in_a_configuration_made_in_python_is_refused():
    config = load_config(Stage1Config, "digits/stage1")
    config.hub_model_id = TOKEN
    with pytest.raises(ConfigError, match="hub_model_id: a secret") as caught:
        check(config)
    assert TOKEN not in str(caught.value)


def test_a_name_of_a_file_with_a_token_is_not_repeated(tmp_path):
    (tmp_path / TOKEN).write_text("max_stpes: 3\n")
    for name in (f"{tmp_path}/{TOKEN}", TOKEN, f"{ADDRESS}.yaml"):
        with pytest.raises(ConfigError) as caught:
            load_config(Stage1Config, name)
        assert TOKEN not in str(caught.value) and "hunter2" not in str(caught.value)


def test_any_message_is_redacted():
    """Also a message of a library, which quotes what it received."""
    text = str(ConfigError([Problem("x", f"cannot open {ADDRESS} with {TOKEN}")], f"the file {TOKEN}"))
    assert text == "the file ***: 1 problem\n  - x: cannot open https://***@host/images with ***"
    assert shown({"a": 1, "hub_token": "hunter2"}) == "{'a': 1, 'hub_token': ***"
    assert shown("x" * 50 + TOKEN) == f"'{'x' * 50}***'"  # redacted before it is cut


def test_ordinary_settings_are_no_secrets(tmp_path):
    known = {key for keys in KEYS.values() for key in keys}
    assert [key for key in sorted(known) if names_secret(key)] == ["training_arguments.hub_token"]
    for text in ("hf_internal_testing/tiny", "hf_token", "http://host:80/a@b", "//a:b", "me@host:x", "a:b@c"):
        assert redacted(text) == text
        save_config(load_config(Stage1Config, "digits/stage1", {"output_dir": text}), tmp_path / "c.yaml")
