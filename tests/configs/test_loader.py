"""The typed loader: overrides, errors a user can act on, and every shipped YAML."""

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import configs
from configs import ConfigError, Section, load_config, parse_arguments, run, save_config, to_dict
from configs.loader import switches
from configs.problems import Problem
from configs.sections import Positive, PositiveFloat
from configs.values import read_value
from configs.yaml_files import preset_names, read_yaml

ROOT = Path(configs.__file__).parent
SHIPPED = sorted(path for path in ROOT.rglob("*/*.yaml") if path.parent.name != "accelerate")
SHORT_NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in SHIPPED]
# what a user must give with a preset
DATA = {"data.dataset": "path/to/images"}
GIVEN = {name: DATA if name.startswith(("own/", "emoji/", "medical/")) else {} for name in SHORT_NAMES}


@dataclass(kw_only=True)
class Inner(Section):
    """A nested section.

    width: width of the section
    names: some names
    """

    width: Positive = 4
    names: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Toy(Section):
    """A small configuration.

    steps: number of steps
    rate, flag: a rate,
        and a flag
    label: some text
    """

    steps: Positive
    rate: PositiveFloat = 0.5
    flag: bool = False
    label: str | None = "x"
    inner: Inner = field(default_factory=Inner)

    def problems(self):
        if self.rate > self.steps:
            yield "rate", self.rate, f"must be at most steps ({self.steps})"


def problems(cls, name=None, overrides=None):
    """`{key: message}` of the ConfigError that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load_config(cls, name, overrides)
    return {problem.key: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    "arguments, get, expected",
    [
        (["--rate", "0.25"], lambda c: c.rate, 0.25),
        (["--rate", "1e-4"], lambda c: c.rate, 1e-4),  # YAML 1.1 reads this as a string
        (["--rate=1e-4"], lambda c: c.rate, 1e-4),
        (["--flag", "true"], lambda c: c.flag, True),
        (["--flag=no"], lambda c: c.flag, False),
        (["--label", "null"], lambda c: c.label, None),
        (["--label", "2024"], lambda c: c.label, "2024"),
        (["--label=a=b"], lambda c: c.label, "a=b"),
        (["--inner.width", "8"], lambda c: c.inner.width, 8),
        (["--inner.names", "[a, b]"], lambda c: c.inner.names, ["a", "b"]),
        (["--inner.names=[]", "--inner.width=2"], lambda c: (c.inner.names, c.inner.width), ([], 2)),
    ],
)
def test_overrides(arguments, get, expected):
    value = get(load_config(Toy, *parse_arguments(["--steps", "7", *arguments])))
    assert value == expected and type(value) is type(expected)


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 3\nrate: 0.1\ninner: {width: 5, names: [a]}\n")
    config = load_config(Toy, *parse_arguments([str(path), "--inner.width", "6"]))
    assert config == Toy(steps=3, rate=0.1, inner=Inner(width=6, names=["a"]))


@dataclass(kw_only=True)
class Positional(Toy):
    positional = "label"


@pytest.mark.parametrize("label", ["runs/mine", "user/name", "2024", "."])
def test_the_first_argument_may_set_a_key(label):
    config = load_config(Positional, *parse_arguments([label, "--steps", "3"], "label"))
    assert (config.label, config.steps) == (label, 3)


def test_a_yaml_file_may_stand_in_place_of_the_first_argument(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("label: mine\nsteps: 2\n")
    found: list[Positional] = []
    run(Positional, found.append, "command", [str(tmp_path / "mine.yaml"), "--steps", "3"])
    run(Positional, found.append, "command", ["mine", "--steps", "3"])
    assert [(config.label, config.steps) for config in found] == [("mine", 3), ("mine", 3)]
    with pytest.raises(SystemExit):
        run(Positional, found.append, "command", ["mine", "yours", "--steps", "3"])
    assert "'yours' follows no --key (only the first argument may be a label)" in capsys.readouterr().err
    run(Positional, found.append, "command", ["--help"])
    assert "usage: command LABEL [--key value ...]" in capsys.readouterr().out


def test_malformed_command_lines_are_reported_together():
    arguments = ["--rate", "--flag", "true", "stray", "--label", "[1,", "--steps", "--inner.width", "0"]
    with pytest.raises(ConfigError) as caught:
        load_config(Toy, *parse_arguments(arguments))
    # the problems of the loader are included; the missing key is reported once
    assert sorted(problem.key for problem in caught.value.problems) == ["", "inner.width", "label", "rate", "steps"]
    assert "'stray'" in str(caught.value) and "--steps VALUE" in str(caught.value)


def test_all_problems_at_once_with_the_nearest_key():
    found = problems(
        Toy, overrides={"rate": "fast", "inner": {"width": 0, "nams": []}, "flg": True, "zzz": 1, "label": [1]}
    )
    assert set(found) == {"rate", "inner.width", "inner.nams", "flg", "zzz", "label", "steps"}
    assert "did you mean 'names'" in found["inner.nams"]
    assert "did you mean 'flag'" in found["flg"]
    assert all(
        key in found["zzz"] for key in ("flag", "inner", "label", "rate", "steps")
    )  # no similar key, so all keys are listed
    assert "'fast'" in found["rate"] and "number" in found["rate"]
    assert "0" in found["inner.width"] and "from 1 to" in found["inner.width"]
    assert found["steps"] == "is required and was not given; write --steps VALUE"


@pytest.mark.parametrize("value", [-1, 0, float("nan"), float("inf"), None, [0.1]])
def test_out_of_range_or_of_the_wrong_type(value):
    assert set(problems(Toy, overrides={"steps": 1, "rate": value})) == {"rate"}


@pytest.mark.parametrize(
    "hint, value",
    [
        (int, True),
        (float, True),
        (list[int], [2, True]),
        (list[float], [0.5, False]),
        (tuple[float, ...], [True]),
        (dict[str, float], {"x": True}),
        (list[list[int]], [[1], [True]]),
        (int | None, True),
        (str, True),
        (str, 2024.1),  # written as 2024.10
    ],
)
def test_a_value_of_another_kind_is_not_converted(hint, value):
    with pytest.raises(ValueError, match=r"received .* must be"):
        read_value(hint, value)


@pytest.mark.parametrize(("value", "advice"), [(5.5, ""), ("16x32", ""), (0, "; write [0]")])
def test_a_list_is_suggested_if_its_entry_would_be_right(value, advice):
    with pytest.raises(ValueError, match="received") as refused:
        read_value(Positive | list[int] | None, value)
    assert str(refused.value).endswith(f"a list in which every entry is a whole number or null{advice}")


@pytest.mark.parametrize(
    "value, words",
    [
        (2**63, "must be a finite number from -9223372036854775807"),
        pytest.param(10**5000, "received a int that is too long to show; must be a finite number", id="digits"),
        (float("nan"), "received nan; must be a finite number"),
        (1e39, "received 1e\\+39; must be a finite number"),
        ("a\x1b[2J", r"received 'a\\x1b\[2J'; must be printable text"),
        ("a\nb", r"received 'a\\nb'; must be printable text"),
        (object(), "must be text, a number, true, false or null"),
        (torch.zeros(2), "must be text, a number, true, false or null"),
        ({1}, "must be text, a number, true, false or null"),
    ],
)
def test_values_for_a_library_are_plain(value, words):
    """A section whose keys are those of a library takes any value, at any depth, but none that YAML cannot hold."""
    for section in ({"x": value}, {"x": [1, {"y": value}]}):
        with pytest.raises(ValueError, match=words):
            read_value(dict[str, Any], section)


def test_sections_made_in_python_have_words_as_keys_and_an_end():
    endless: dict[str, Any] = {}
    endless["again"] = endless
    for model, words in [
        ({1: 2}, "model: received the key 1"),
        (endless, "nested too deeply"),
        ({"a": {None: 1}}, "null"),
    ]:
        from stage2_prior import Stage2Config

        with pytest.raises(ConfigError, match=words):
            load_config(Stage2Config, "digits/stage2", {"model": model})


def test_a_message_is_cut_and_shows_no_control_characters():
    long, hostile = "x" * 100_000, "\x1b[31m\r\u202e\0"
    for key, message in [(long, "a"), ("a", long), (hostile, hostile), ("a.b" * 999, "c"), ("a\nb", "c")]:
        text = str(Problem(key, message))
        assert len(text) <= 1200 and text.isprintable()
    assert str(ConfigError([Problem("a", "b")], f"{hostile}\n{long}")).count("\n") == 1
    text = str(ConfigError([Problem(str(number), "x") for number in range(1000)]))
    assert text.count("\n") == 21 and text.endswith("and 980 more")
    found = problems(Toy, None, {"steps": list(range(10_000)), long: 1, "inner": {"names": [[long]]}, "label": hostile})
    assert all(len(message) < 200 for message in found.values())


def test_fields_are_checked_against_each_other():
    assert problems(Toy, overrides={"steps": 1, "rate": 2}) == {"rate": "received 2.0; must be at most steps (1)"}


def test_a_rule_that_breaks_because_of_a_wrong_value_is_not_reported():
    assert set(problems(Toy, overrides={"steps": "x", "rate": 2})) == {"steps"}
    assert set(problems(Toy, overrides={"rate": 2, "inner": 5})) == {"steps", "inner"}
    # a rule about other keys is still checked
    assert set(problems(Toy, overrides={"steps": 1, "rate": 2, "flag": "maybe"})) == {"rate", "flag"}


STAGE1 = {
    "output_dir": "x",
    "max_steps": 20,
    "data": {"dataset": "digits"},
    "model": {
        "image_size": 16,
        "base_channels": 8,
        "channel_multiplier": [1, 2],
        "norm_num_groups": 4,
        "latent_channels": 8,
        "embed_dim": 4,
        "num_embeddings": 16,
    },
    "loss": {"perceptual_weight": 0},
    "discriminator": {"base_channels": 8, "num_layers": 1},
}


@pytest.mark.parametrize(
    "overrides, key, words",
    [
        ({"loss.adversarial_start_step": 5, "loss.discriminator_start_step": 10}, "loss.adversarial_start_step", "10"),
        ({"loss.perceptual_weight": 1, "loss.lpips_backbone": "squeeze"}, "model.image_size", "32 pixels"),
        ({"loss.l1_weight": 0}, "loss.l1_weight", "must not all be 0"),
        ({"loss.adversarial_type": "wasserstein"}, "loss.adversarial_type", "lecam_weight above 0"),
        ({"loss.r1_weight": 1}, "discriminator.norm_type", "'group' or 'actnorm'"),
        ({"discriminator.num_layers": 4}, "discriminator.num_layers", "16 pixels"),
        ({"model.base_chanels": 8}, "model.base_chanels", "did you mean 'base_channels'"),
        ({"model.fingerprint": "abc"}, "model.fingerprint", "unknown"),
        ({"model.image_size": 15}, "model.image_size", "received 15; must be divisible by the downsampling factor 2"),
        ({"model.norm_num_groups": 3}, "model.norm_num_groups", "received 3; must divide"),
        ({"model.in_channels": 2000}, "model.in_channels", "received 2000; images have at most 1024 channels"),
        ({"model.num_embeddings": "many"}, "model.num_embeddings", "a whole number"),
        ({"data.augmentation.rotate": 200}, "data.augmentation.rotate", "180"),
        ({"data.augmentation.rotat": 20}, "data.augmentation.rotat", "did you mean 'rotate'"),
        ({"warmup_steps": 21}, "warmup_steps", "max_steps (20)"),
        ({"push_to_hub": True}, "hub_model_id", "user/name"),
    ],
)
def test_stage1_rules(overrides, key, words):
    from stage1_vqgan import Stage1Config

    load_config(Stage1Config, None, plain(STAGE1))  # valid without the override
    found = problems(Stage1Config, None, plain(STAGE1) | overrides)
    assert list(found) == [key] and words in found[key]


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss.adversarial_type": "wasserstein", "loss.lecam_weight": 0.1},
        {"loss.adversarial_type": "wasserstein", "loss.r1_weight": 1, "discriminator.norm_type": "group"},
        {"loss.gradient_penalty_weight": 10, "discriminator.norm_type": "actnorm"},
        {"loss.adversarial_weight": 0, "loss.r1_weight": 1},  # no discriminator, so the penalty does not matter
        {"loss.adversarial_weight": 0, "loss.adversarial_type": "wasserstein"},
        {"loss.l1_weight": 0, "loss.l2_weight": 1},
    ],
)
def test_valid_settings_of_stage1_are_accepted(overrides):
    from stage1_vqgan import Stage1Config

    load_config(Stage1Config, None, plain(STAGE1) | overrides)


def test_numbers_in_the_model_section_may_be_written_like_all_others():
    from stage1_vqgan import Stage1Config

    _, overrides, _ = parse_arguments(["--model.quantizer_options.commitment_cost", "5e-1", "--learning_rate", "5e-1"])
    config = load_config(Stage1Config, None, plain(STAGE1) | overrides)
    assert config.vqgan_config().quantizer_options["commitment_cost"] == config.learning_rate == 0.5


@pytest.mark.parametrize("base_channels", [4, 6, 7, 12, 20, 36, 64, 100])
def test_a_discriminator_width_that_is_accepted_can_be_built(base_channels):
    from stage1_vqgan import Stage1Config
    from stage1_vqgan.training.discriminator import PatchDiscriminator

    wanted = {"discriminator.base_channels": base_channels, "discriminator.norm_type": "group"}
    settings = load_config(Stage1Config, None, plain(STAGE1) | wanted).discriminator
    with torch.device("meta"):
        PatchDiscriminator(3, settings.base_channels, 3, settings.norm_type)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'digit/stage1'; did you mean the preset 'digits/stage1'\?"):
        read_yaml("digit/stage1")
    with pytest.raises(ConfigError, match="no file and no preset"):
        read_yaml("nowhere.yaml")


def test_presets_are_found_from_anywhere(tmp_path, monkeypatch):
    assert sorted(SHORT_NAMES) == preset_names()
    expected = read_yaml(str(SHIPPED[0]))
    (tmp_path / "configs" / "own").mkdir(parents=True)
    (tmp_path / "configs" / "own" / "stage1.yaml").write_text("steps: 1\n")
    monkeypatch.chdir(tmp_path)
    assert expected == read_yaml(SHORT_NAMES[0]) == read_yaml(f"configs/{SHORT_NAMES[0]}.yaml")
    assert read_yaml("configs/own/stage1.yaml") == ({"steps": 1}, [])


@pytest.mark.parametrize(
    "text, words", [("- a\n- b\n", "list"), ("just words", "'just words'"), ("a: [1,", "not valid YAML")]
)
def test_yaml_that_is_not_a_mapping(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_yaml(str(tmp_path / "c.yaml"))


def test_empty_yaml_is_an_empty_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    assert load_config(Toy, str(tmp_path / "c.yaml"), {"steps": 2}) == Toy(steps=2)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--flag"], {"flag": True}),
        (["--flag", "--label", "x"], {"flag": True, "label": "x"}),
        (["--flag", "false"], {"flag": False}),
        (["--flag=false"], {"flag": False}),
    ],
)
def test_a_switch_without_a_value_is_true(arguments, expected):
    assert switches(Toy) == {"flag"}
    assert parse_arguments(["--rate", "1", *arguments], None, switches(Toy))[1:] == ({"rate": 1, **expected}, [])


def test_only_a_switch_may_stand_without_a_value(capsys):
    with pytest.raises(SystemExit):
        run(Toy, pytest.fail, "toy", ["--flag", "--steps"])
    assert "1 problem\n  - steps: no value given; write --steps VALUE" in capsys.readouterr().err


def test_switches_are_found_in_sections():
    found = switches(dataclass_of("stage1"))
    assert found >= {"push_to_hub", "bf16", "hub_private_repo", "data.streaming", "data.augmentation.ten_crop"}
    assert not found & {"max_steps", "seed", "data", "data.dataset", "model"}


@pytest.mark.parametrize(
    "overrides, key, words",
    [
        ({"dataset": "x"}, "dataset", "did you mean 'data.dataset'?"),
        ({"image_size": 8, "attn": 1, "rotate": 2, "l1_weight": 3}, "rotate", "'data.augmentation.rotate'"),
        ({"base_channels": 8}, "base_channels", "did you mean 'discriminator.base_channels'?"),
        ({"num_train_epochs": 3, "batch_size": 2, "lr": 1}, "num_train_epochs", "received 3; the length of a run is"),
        ({"batch_size": 3, "lr": 1, "epochs": 1}, "batch_size", "write per_device_train_batch_size"),
    ],
)
def test_a_key_in_the_wrong_place_is_led_to_the_right_one(overrides, key, words):
    assert words in problems(dataclass_of("stage1"), "digits/stage1", overrides)[key]


def test_a_union_names_all_of_its_kinds():
    found = problems(dataclass_of("stage1"), "digits/stage1", {"warmup_steps": 2.5, "dataloader_num_workers": "many"})
    assert found["warmup_steps"].endswith("must be a whole number from 0 to 2147483647 or a number above 0 and below 1")
    assert "a whole number from 0 to 2147483647 or 'auto'" in found["dataloader_num_workers"]


def test_run_passes_the_configuration_to_main():
    received = []
    run(Toy, received.append, "toy", ["--steps", "2", "--rate=1e-1"])
    assert received == [Toy(steps=2, rate=0.1)]


def test_run_exits_with_2_and_the_problems_on_stderr(capsys):
    def main(config):
        load_config(Toy, None, {"steps": "x"})  # a ConfigError from main is reported in the same way

    for arguments, words in [(["--stps", "2"], "did you mean 'steps'"), (["--steps", "2"], "received 'x'")]:
        with pytest.raises(SystemExit) as caught:
            run(Toy, main, "toy", arguments)
        assert caught.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(capsys, flag):
    run(Toy, pytest.fail, "toy command", [flag])
    shown = capsys.readouterr().out
    assert "usage: toy command [CONFIG]" in shown and "A small configuration." in shown
    assert "  --steps (required)\n        number of steps\n" in shown
    assert "  --rate 0.5   --flag false\n        a rate,\n        and a flag\n  --label x\n" in shown
    assert "[inner]\nA nested section.\n\n  --inner.width 4\n        width of the section\n" in shown


def test_help_names_the_presets_of_the_command(capsys):
    for kind in ("stage1", "stage2", "evaluate"):
        run(dataclass_of(kind), pytest.fail, "command", ["--help"])
        line = next(line for line in capsys.readouterr().out.splitlines() if "presets: " in line)
        expected = sorted(name for name in SHORT_NAMES if f"/{kind}" in name)
        assert line.partition("presets: ")[2].rstrip(".").split(", ") == expected


def keys_of(cls, prefix=""):
    for each in fields(cls):
        kind = get_type_hints(cls)[each.name]
        key = f"{prefix}{each.metadata.get('key', each.name)}"
        yield from keys_of(kind, f"{key}.") if is_dataclass(kind) else [key]
    for key, kind in getattr(cls, "fields_of", {}).items():
        yield from keys_of(kind, f"{prefix}{key}.")


@pytest.mark.parametrize("kind", ["stage1", "stage2", "evaluate", "reconstruct", "convert", "prior", "build"])
def test_help_explains_every_key(capsys, kind):
    cls = dataclass_of(kind)
    run(cls, pytest.fail, "command", ["--help"])
    shown = capsys.readouterr().out.splitlines()
    explained = [key for line in shown if line.startswith("  --") for key in re.findall(r"--(\S+)", line)]
    assert sorted(explained) == sorted(keys_of(cls))


def dataclass_of(kind):
    from pipelines.build import BuildConfig
    from pipelines.evaluate import EvaluationConfig
    from stage1_vqgan import Stage1Config
    from stage1_vqgan.convert.config import ConvertConfig
    from stage1_vqgan.evaluate import ReconstructionConfig
    from stage2_prior import Stage2Config
    from stage2_prior.convert.config import ConvertConfig as PriorConvertConfig

    return {
        "stage1": Stage1Config,
        "stage2": Stage2Config,
        "evaluate": EvaluationConfig,
        "reconstruct": ReconstructionConfig,
        "convert": ConvertConfig,
        "prior": PriorConvertConfig,
        "build": BuildConfig,
    }[kind.partition("_")[0]]


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_shipped_configurations_load_and_survive_saving(name, tmp_path):
    cls = dataclass_of(name.rpartition("/")[2])
    config = load_config(cls, name, GIVEN[name])
    save_config(config, tmp_path / "config.yaml")
    again = load_config(cls, str(tmp_path / "config.yaml"))
    assert again == config and to_dict(again) == to_dict(config)


@pytest.mark.parametrize("name", [name for name in SHORT_NAMES if "/stage1" in name])
def test_shipped_stage1_builds(name):
    from stage1_vqgan import VQGANModel
    from stage1_vqgan.training.discriminator import PatchDiscriminator
    from stage1_vqgan.training.discriminator_config import logit_grid_size

    config = load_config(dataclass_of("stage1"), name, GIVEN[name])
    model_config, patch = config.vqgan_config(), config.discriminator
    with torch.device("meta"):
        model = VQGANModel(model_config)
        discriminator = PatchDiscriminator(
            model_config.in_channels, patch.base_channels, patch.num_layers, patch.norm_type
        )
        images = torch.empty(2, model_config.in_channels, *model_config.image_shape)
    assert model.quant_conv(model.encoder(images)).shape == (2, model_config.embed_dim, *model_config.grid)
    if config.loss.adversarial_weight:
        side = logit_grid_size(min(model_config.image_shape), patch.num_layers)
        assert discriminator(images).shape == (2, 1, side, side) and side >= 1


def test_the_vqvae_preset_has_no_discriminator():
    preset = load_config(dataclass_of("stage1"), "fashion_mnist/stage1_vqvae")
    assert preset.loss.perceptual_weight == preset.loss.adversarial_weight == 0
    gan = load_config(dataclass_of("stage1"), "fashion_mnist/stage1")
    assert preset.model == gan.model and preset.output_dir != gan.output_dir


@pytest.mark.parametrize("name", [name for name in SHORT_NAMES if "/stage2" in name])
def test_shipped_stage2_builds(name):
    from stage2_prior import TokenLayout
    from stage2_prior.prior import build_prior

    config = load_config(dataclass_of("stage2"), name, GIVEN[name])
    layout = TokenLayout(1024, ("a", "b"), (16, 16), 16, "fingerprint", family=config.prior)
    with torch.device("meta"):
        prior = build_prior(config.model, layout)
    assert prior.get_output_embeddings().weight.shape[0] == layout.vocab_size
    for key, value in config.model.items():
        assert getattr(prior.config, key) == value


def plain(values):
    """Nested values as dotted overrides."""
    flat = {}
    for key, value in values.items():
        flat |= {f"{key}.{k}": v for k, v in plain(value).items()} if isinstance(value, dict) else {key: value}
    return flat
