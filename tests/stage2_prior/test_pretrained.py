"""Loading a prior: its own weights and nothing else, or an error."""

import itertools
import json
import math
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import ConfigError
from configs.checksums import Damaged, write_checksums
from pipelines.build import BuildConfig, build
from stage2_prior import TokenLayout, load_language_model, load_prior
from stage2_prior.adapters import attach_adapter, merge_adapter, without_adapters
from stage2_prior.prior import adapt_prior, build_prior
from stage2_prior.training.config import LoraConfig
from tests.model_folders import change_config, change_weights, plant_code, without
from tests.slow import few
from tests.tiny import LLAMA, RANDOM_PRIORS


@pytest.fixture
def folder(random_prior, layout, tmp_path) -> Path:
    """A saved llama prior."""
    random_prior("llama", layout).save_pretrained(tmp_path / "prior")
    layout.save_pretrained(tmp_path / "prior")
    return tmp_path / "prior"


def assert_refused(folder: Path, layout: TokenLayout, message: str) -> None:
    """Every function that reads a prior refuses the folder."""
    with pytest.raises((ValueError, OSError), match=message):
        load_language_model(folder)
    with pytest.raises((ValueError, OSError), match=message):
        load_prior(str(folder))
    with pytest.raises(ConfigError, match=r"model_name_or_path: received .*its prior cannot be loaded"):
        adapt_prior(str(folder), {}, layout)


# ---------------------------------------------------------------------- whole models


@pytest.mark.parametrize(("max_shard_size", "dtype"), [("5GB", torch.float32), ("5KB", torch.bfloat16)])
@pytest.mark.parametrize(
    ("model_type", "tied"),
    few(itertools.product(RANDOM_PRIORS, [False, True]), ("llama", False), ("gpt2", True), ("qwen3", False)),
)
def test_what_was_saved_is_loaded(random_prior, layout, tmp_path, model_type, tied, max_shard_size, dtype):
    prior = random_prior(model_type, layout, tie_word_embeddings=tied).to(dtype)
    prior.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (max_shard_size == "5KB") == (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_language_model(tmp_path)
    assert type(loaded) is type(prior) and not loaded.training
    for name, parameter in prior.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.cpu())


@pytest.mark.parametrize(
    "change",
    [
        without("layers.1.mlp.up_proj"),
        without("lm_head"),
        lambda weights: {},
        lambda weights: {name.replace("model.", "other."): weight for name, weight in weights.items()},
        lambda weights: {**weights, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
        lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"][:-1].clone()},
    ],
    ids=["a layer's", "lm_head", "all", "renamed", "one too many", "another shape"],
)
def test_weights_that_do_not_fit_are_refused(folder, layout, change):
    change_weights(folder, change)
    assert_refused(folder, layout, "do not fit config.json")


@pytest.mark.parametrize("model_type", ["qwen3", "gemma", "gpt2"])
def test_another_model_type_is_refused(folder, layout, model_type):
    change_config(folder, model_type=model_type)
    assert_refused(folder, layout, r"do not fit config\.json|model_type: received 'gemma'.*LlamaForCausalLM")


def test_a_shard_that_lacks_weights_is_refused(random_prior, layout, tmp_path):
    random_prior("llama", layout).save_pretrained(tmp_path, max_shard_size="5KB")
    layout.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    shard = next(iter(tmp_path.glob("model-*.safetensors")))
    save_file({"other": torch.ones(1)}, shard, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(tmp_path, layout, "do not fit config.json")


@pytest.mark.parametrize(
    "place", ["../elsewhere/model.safetensors", "/elsewhere", "sub/model.safetensors", "pytorch_model.bin", "..", 3]
)
def test_shards_outside_the_folder_are_refused(folder, layout, place, random_prior):
    outside = folder.parent / "elsewhere"
    shutil.copytree(folder, outside)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = str(outside / "model.safetensors") if place == "/elsewhere" else place
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folder, layout, "weight_map: received .*must name a .safetensors file in the same folder")


def test_pickled_weights_are_not_read(folder, layout):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, layout, r"model\.safetensors is missing; other formats")


@pytest.mark.parametrize(
    "field",
    [
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"_attn_implementation": "someone/kernel@main:attention"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"attn_implementation": "paged|someone/kernel"},
        {"attn_implementation": "flash_attention_2"},  # a kernel of the Hub if flash-attn is not installed
        {"experts_implementation": "sonicmoe"},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"transformers_weights": "other.safetensors"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"fusion_config": {"patch_embeddings": True}},
        {"model_type": "rwkv"},
        {"dtype": "int8"},
        {"torch_dtype": "__dict__"},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**12},
        {"vocab_size": 2**40},
        pytest.param({"layer_types": ["full_attention"] * 10**5}, marks=pytest.mark.slow),
        {"text_config": {"num_layers": 10**6}},
    ],
    ids=lambda field: "-".join(f"{key}={str(value)[:40]}" for key, value in field.items()),
)
def test_a_saved_model_chooses_no_kernel_and_no_other_weights(folder, layout, field, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("was read"))
    change_config(folder, **field)
    assert_refused(folder, layout, "received")


@pytest.mark.parametrize(
    "change", [{"vocab_size": 10**9}, {"hidden_size": 2**20}, {"intermediate_size": 10**8}], ids=str
)
def test_models_far_above_the_weights_are_refused_before_they_take_memory(folder, layout, change, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("was built"))
    change_config(folder, **change)
    assert_refused(
        folder, layout, r"config\.json.* describes a model of [\d,]+ weights, but 25,632 are stored|config\.json"
    )


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 0}, {"hidden_act": "no"}, {"rope_parameters": 3}, {"architectures": 3}, {"id2label": []}],
    ids=str,
)
def test_what_transformers_raises_comes_back_in_our_words(folder, layout, change):
    """Each architecture raises exceptions of its own."""
    change_config(folder, **change)
    assert_refused(folder, layout, str(folder))


def test_deep_and_large_files_are_refused(folder, layout):
    deep: dict = {}
    for _ in range(500):
        deep = {"text_config": deep}
    change_config(folder, more=deep)
    assert_refused(folder, layout, r"config\.json: this file is nested more than 20 deep")
    (folder / "config.json").write_text("[" + "1," * 2**23 + "1]")
    assert_refused(folder, layout, r"config\.json: this file has [\d,]+ bytes; .* at most 16,777,216")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(folder, layout, value):
    def spoil(weights):
        weights["model.norm.weight"][3] = value
        return weights

    change_weights(folder, spoil)
    assert_refused(folder, layout, r"model\.safetensors: these weights hold values .* not finite: model\.norm\.weight;")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_other_dtypes_are_refused(folder, layout, dtype):
    change_weights(folder, lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"].to(dtype)})
    assert_refused(folder, layout, r"do not fit config\.json: 1 wrong dtype: lm_head\.weight (I32|U8|F8_E4M3)")


def test_long_lists_of_weights_are_cut(folder, layout):
    change_weights(folder, lambda weights: {f"other.{name}": weight for name, weight in weights.items()})
    assert_refused(folder, layout, r"21 missing: \S+, \S+, \S+ and 18 more; 21 unexpected: \S+, \S+, \S+ and 18 more")


def test_a_weight_in_two_shards_is_refused(random_prior, layout, tmp_path):
    random_prior("llama", layout).save_pretrained(tmp_path, max_shard_size="5KB")
    layout.save_pretrained(tmp_path)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    save_file({**load_file(first), **load_file(second)}, first, metadata={"format": "pt"})
    assert_refused(tmp_path, layout, r"another file of this model holds these tensors too")


def test_shards_of_a_distributed_model_are_not_read(folder, layout):
    """transformers would read them instead of model.safetensors."""
    shutil.copy(folder / "model.safetensors", folder / "shard-00001-model-00001-of-00001.safetensors")
    assert_refused(folder, layout, "shards of a distributed model are not read")


HEADERS = {
    "an absurd length": struct.pack("<Q", 2**62),
    "an absurd shape": {"shape": [2**31, 2**31], "data_offsets": [0, 4]},
    "an absurd offset": {"shape": [1], "data_offsets": [2**60, 2**60 + 4]},
    "no safetensors": b"404: not found",
    "nothing": b"",
    "a pickle": pickle.dumps({"lm_head.weight": 1}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_headers_come_back_in_our_words(folder, layout, case):
    content = HEADERS[case]
    if isinstance(content, dict):
        header = json.dumps({"lm_head.weight": {"dtype": "F32", **content}}).encode()
        content = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(
        folder, layout, r"model\.safetensors: this weights file is damaged, or is not a safetensors file \(\w"
    )


def test_checksums_find_every_changed_file(folder, layout):
    write_checksums(folder)
    load_prior(str(folder))
    for path in [*folder.glob("*n.json"), *folder.glob("*.safetensors"), folder / "token_layout.json"]:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"e", b"a", 1))
        with pytest.raises(ValueError, match=rf"{path}: .*(changed|not JSON).* remove {folder}/checksums\.json"):
            load_language_model(folder)
        path.write_bytes(content)
    load_language_model(folder)


def test_weights_that_were_added_later_are_refused(random_prior, layout, tmp_path):
    """transformers would read them instead of the shards."""
    random_prior("llama", layout).save_pretrained(tmp_path, max_shard_size="5KB")
    write_checksums(tmp_path)
    random_prior("llama", layout, seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    with pytest.raises(Damaged, match=r"model\.safetensors: this file was added after the folder was saved"):
        load_language_model(tmp_path)


def test_planted_code_is_neither_run_nor_asked_for(folder, layout, answers, tmp_path):
    plant_code(folder, tmp_path / "mark")
    assert_refused(folder, layout, "trust_remote_code")
    assert answers == [] and not (tmp_path / "mark").exists()


# ---------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(folder, random_prior, layout, tmp_path) -> Path:
    """A saved adapter of the prior in `folder`."""
    model = attach_adapter(random_prior("llama", layout), str(folder), LoraConfig(r=2), [])
    model.save_pretrained(tmp_path / "adapter")
    layout.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_that_lacks_weights_is_refused(adapter, layout):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"the weights do not fit adapter_config\.json: 1 missing: .*lora_B"):
        load_prior(str(adapter))


def test_pickled_adapters_are_not_read(adapter):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="other formats than safetensors"):
        load_prior(str(adapter))


def test_the_base_of_an_adapter_is_checked_like_any_prior(adapter, folder, answers):
    change_weights(folder, without("lm_head"))
    with pytest.raises(ConfigError, match=r"an adapter of the prior .*do not fit config\.json"):
        load_prior(str(adapter))
    plant_code(folder, adapter / "mark")
    with pytest.raises(ConfigError, match=r"an adapter of the prior .*custom code"):
        load_prior(str(adapter))
    assert answers == [] and not (adapter / "mark").exists()


SLOW_PATTERN = "((.*)*)*!"  # takes longer than any test if it is matched with a long name

SETTINGS = {
    "target_modules": [SLOW_PATTERN, "all-linear", [SLOW_PATTERN], [3], {"q_proj": 1}],
    "exclude_modules": [SLOW_PATTERN, [SLOW_PATTERN]],
    "modules_to_save": [[SLOW_PATTERN]],
    "layers_pattern": [SLOW_PATTERN, [SLOW_PATTERN]],
    "rank_pattern": [{SLOW_PATTERN: 2}, {"q_proj": 10**9}, {"q_proj": "2"}],
    "alpha_pattern": [{SLOW_PATTERN: 2}],
    "trainable_token_indices": [{SLOW_PATTERN: [1]}, [-1]],
    "r": [10**9, 0, -1, "2", True, 2.5, None],
    "lora_alpha": ["2", 0, None],
    "peft_type": ["PREFIX_TUNING", "XLORA", "no", None, 3],
    "task_type": ["SEQ_CLS"],
    "init_lora_weights": ["eva", "pissa", "pissa_niter_9", "loftq", "corda", "olora", "lora_ga"],
    "megatron_core": ["antigravity"],
    "megatron_config": [{"a": 1}],
    "eva_config": [{"rho": 2.0}],
    "corda_config": [{"cache_file": "/etc/passwd"}],
    "loftq_config": [{"loftq_bits": 4}],
    "layer_replication": [[[0, 10**9]]],
    "target_parameters": [["q_proj.weight"]],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "unknown_setting": ["value"],
}


def test_settings_of_an_adapter_are_refused_before_peft_sees_them(adapter, monkeypatch):
    monkeypatch.setattr("peft.get_peft_model", lambda *a, **k: pytest.fail("peft saw it"))
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *a, **k: pytest.fail("peft saw it"))
    saved = (adapter / "adapter_config.json").read_text()
    for key, values in SETTINGS.items():
        message = rf"adapter_config\.json: {key}: received|adapter_model.*do not fit r: received rank"
        for value in values:
            (adapter / "adapter_config.json").write_text(json.dumps({**json.loads(saved), key: value}))
            with pytest.raises(ValueError, match=message):
                merge_adapter(None, adapter)


def test_what_an_adapter_says_of_its_training_is_ignored(adapter):
    expected = load_prior(str(adapter))
    auto = {"parent_library": "antigravity", "base_model_class": "fly"}
    change_config(
        adapter, "adapter_config.json", auto_mapping=auto, revision="main", lora_dropout=0.5, inference_mode=False
    )
    loaded = load_prior(str(adapter))
    assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in expected.named_parameters())


@pytest.mark.parametrize("damage", ["unexpected", "of the base", "not finite", "int", "misshapen", "header"])
def test_weights_of_an_adapter_that_cannot_be_right(adapter, damage):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_B" in name)
    if damage == "unexpected":
        weights["base_model.model.other.lora_A.weight"] = torch.zeros(2, 2)
    elif damage == "of the base":
        weights["base_model.model.model.norm.weight"] = torch.zeros(32)
    elif damage == "not finite":
        weights[name][0, 0] = math.nan
    elif damage == "int":
        weights[name] = weights[name].to(torch.int32)
    elif damage == "misshapen":
        weights[name] = weights[name].T.contiguous()
    save_file(weights, path)
    if damage == "header":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter"):
        load_prior(str(adapter))


def test_checksums_of_an_adapter(adapter):
    write_checksums(adapter)
    load_prior(str(adapter))
    data = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    data[-2] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(Damaged, match=r"adapter_model\.safetensors: the contents of this file have changed"):
        load_prior(str(adapter))


def test_an_adapter_of_itself_is_refused(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    for base in (adapter, other):
        change_config(adapter, "adapter_config.json", base_model_name_or_path=str(base))
        change_config(other, "adapter_config.json", base_model_name_or_path=str(adapter))
        with pytest.raises(ConfigError, match="its base_model_name_or_path leads back to"):
            load_prior(str(adapter))


@pytest.mark.parametrize("base", [None, "", 3])
def test_an_adapter_must_name_its_prior(adapter, base):
    change_config(adapter, "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ConfigError, match=r"its adapter_config\.json lacks base_model_name_or_path"):
        load_prior(str(adapter))


@pytest.mark.parametrize(
    ("model_type", "classes", "way"),
    few(
        itertools.product(RANDOM_PRIORS, ["abcde", "cax"], ["load_adapter", "PeftModel"]),
        ("llama", "cax", "load_adapter"),
        ("gpt2", "cax", "PeftModel"),
        ("qwen3", "abcde", "PeftModel"),
    ),
)
@torch.no_grad()
def test_merging_keeps_the_logits_and_leaves_the_prior_alone(layout, random_prior, tmp_path, model_type, classes, way):
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    random_prior(model_type, layout).save_pretrained(base)
    tokens = list(range(layout.num_codes, layout.vocab_size)) if classes != "abcde" else []
    model = attach_adapter(random_prior(model_type, layout), base, LoraConfig(r=2), tokens)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    prior = model.eval()
    if way == "load_adapter":
        prior = load_language_model(base)
        prior.load_adapter(folder)
    sequences = torch.tensor([[layout.num_codes + 2, 3, 1, 4], [layout.null_token, 1, 5, 9]])
    expected = prior(input_ids=sequences).logits
    plain = load_language_model(base)
    assert not torch.allclose(plain(input_ids=sequences).logits, expected, atol=1e-2)
    assert without_adapters(plain) is plain
    merged = without_adapters(prior)
    assert type(merged) is type(plain) and merged is not prior
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in plain.named_parameters()}
    torch.testing.assert_close(merged(input_ids=sequences).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(prior(input_ids=sequences).logits, expected)
    merged.save_pretrained(tmp_path / "merged")
    again = load_language_model(tmp_path / "merged")
    assert torch.equal(again(input_ids=sequences).logits, merged(input_ids=sequences).logits)


def test_adapters_that_are_switched_off_are_not_merged(adapter, folder):
    prior = load_language_model(folder)
    expected = {name: weight.clone() for name, weight in prior.named_parameters()}
    prior.load_adapter(adapter)
    for module in prior.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.ones_(module.lora_B["default"].weight)
            module.enable_adapters(False)
    merged = without_adapters(prior)
    assert all(torch.equal(merged.get_parameter(name), weight) for name, weight in expected.items())


# ---------------------------------------------------------------------- building


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoe", "jetmoe", "gpt_oss"])
def test_mixtures_of_experts_are_refused(layout, model_type):
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = {**LLAMA, **experts, "model_type": model_type, "num_key_value_heads": 2, "head_dim": 8}
    with pytest.raises(ConfigError, match=rf"model\.model_type: received '{model_type}'; the router of its experts"):
        build_prior(model, layout)


def test_build_says_what_is_wrong_with_the_prior(tiny_runs, tmp_path):
    prior = tmp_path / "prior"
    shutil.copytree(tiny_runs.prior, prior, ignore=shutil.ignore_patterns("checkpoint-*"))
    change_weights(prior, without("lm_head"))
    config = BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=str(prior), output_dir=str(tmp_path / "pipeline"))
    with pytest.raises(ConfigError, match=r"prior: .*cannot be loaded: .*do not fit config\.json.*lm_head"):
        build(config)
    assert not (tmp_path / "pipeline").exists()
