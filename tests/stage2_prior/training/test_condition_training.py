"""Priors with conditions from their data to samples, what their folders hold, and the start from a language model."""

import dataclasses
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from configs import ConfigError
from configs.interruption import StopRequest
from configs.run_folder import RunFolder
from stage2_prior import CodeStore, SamplingOptions, TokenLayout, load_prior, sample_codes
from stage2_prior.condition_text import load_text_tokenizer, train_text_tokenizer, vocabulary_size
from stage2_prior.data import CodeDataset
from stage2_prior.export import export_prior
from stage2_prior.model_card import prior_card
from stage2_prior.prior import adapt_prior, build_prior
from stage2_prior.tokenization import tokenize
from stage2_prior.training.arguments import training_arguments
from stage2_prior.training.grid_prompts import grid_rows
from stage2_prior.training.run import Training, initial_prior, open_codes, train
from tests import conditioned, tiny
from tests.conditioned import ALL, settings

CONDITIONS = {**ALL, "style": {**ALL["style"], "dropout": 0.2}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data and two tokenizers."""
    with conditioned.prepared(tmp_path_factory.mktemp("training")) as folder:
        yield folder


@pytest.fixture(scope="module")
def config(root):
    twin = {**ALL["twin"], "tokenizer": str(root / "own")}
    return settings(root, "run", {**CONDITIONS, "twin": twin}, num_sample_images=6, condition_dropout=0.0)


@pytest.fixture(scope="module")
def prior(config):
    tokenize(config)
    return train(config)


@pytest.fixture(scope="module")
def store(prior, config):
    return CodeStore(config.code_store)


def test_the_prior_knows_its_conditions(prior, config, store):
    layout = TokenLayout.from_pretrained(config.output_dir)
    names = ("class", "style", "text", "gray", "small", "twin")
    assert tuple(segment.name for segment in layout.conditions) == names
    assert [segment.name for segment in layout.conditions if segment.has_null] == ["style"]
    assert not layout.has_null and prior.config.vocab_size == layout.vocab_size
    together = open_codes(dataclasses.replace(config, condition_dropout=0.1))[1]
    assert together.has_null and [segment.name for segment in together.segments if segment.has_null] == ["style"]
    assert store.layout.segments[0].has_null  # the store does not decide it


def test_the_folder_holds_the_tokenizers_of_conditions(prior, config, root, store, tmp_path):
    exported = tmp_path / "exported"
    exported.mkdir()
    export_prior(root / "run" / "prior", exported, "me/prior")
    for folder in (root / "run" / "prior", exported):
        assert {path.name for path in (folder / "conditions").iterdir()} == {"text", "twin"}
        for name, file in (("text", "tokenizer.json"), ("twin", "model.safetensors"), ("twin", "config.json")):
            saved = store.folder / "conditions" / name / file
            assert (folder / "conditions" / name / file).read_bytes() == saved.read_bytes()


def test_training_drops_a_condition(config, store):
    """The dropout of the settings reaches the batches: a fifth of the styles, and no text."""
    layout = open_codes(config)[1]
    dataset = CodeDataset(store.split("train"), layout, 0.0, config.seed, config.segment_dropout)
    keys = torch.stack(torch.meshgrid(torch.arange(50), torch.arange(30), indexing="ij"), -1).reshape(-1, 2).numpy()
    prompts = dataset.__getitems__(keys)["input_ids"][:, : layout.prompt_length]
    dropped = (prompts[:, layout.places["style"]] == layout.null_of("style")).float().mean()
    assert abs(dropped - 0.2) < 0.06  # 5 standard deviations of 1,500 draws are 0.052
    empty = (prompts[:, layout.places["text"]] == layout.null_of("text")).all(1).float().mean()
    assert round(float(empty) * 30) == 2  # the rows without text


def test_only_a_prior_without_conditions_is_called_unconditional(root, tmp_path, capsys):
    config = settings(root, "style", {"style": ALL["style"]})
    data = dataclasses.replace(config.data, use_labels=False, label_column=None)
    config = dataclasses.replace(config, data=data)
    tokenize(config)
    store, layout = open_codes(config)
    with RunFolder(config, True, export_prior) as run, StopRequest() as request:
        Training(run, request, training_arguments(config), store, layout).tell()
    printed = capsys.readouterr().out
    assert "unconditional" not in printed and printed.count("style (3 classes)") == 2


def test_the_run_trains_with_the_dropouts_of_the_settings(prior, config, tmp_path):
    config = dataclasses.replace(config, output_dir=str(tmp_path), condition_dropout=0.3)
    store, layout = open_codes(config)
    with RunFolder(config, True, export_prior) as run, StopRequest() as request:
        trainer = Training(run, request, training_arguments(config), store, layout).trainer
    assert trainer.train_dataset.segment_dropout == {"style": 0.2} and trainer.train_dataset.condition_dropout == 0.3
    assert not trainer.eval_dataset.segment_dropout and trainer.eval_dataset.condition_dropout == 0.0


def test_samples_of_the_prior(prior, config, store):
    layout = TokenLayout.from_pretrained(config.output_dir)
    prompts = torch.from_numpy(CodeDataset(store.split("validation"), layout).read([0, 3])[2]).to(prior.device)
    nulls = layout.null_prompt(["style"]).to(prior.device)
    nulls = prompts.where(nulls < 0, nulls)
    options = SamplingOptions(guidance_scale=2.0)
    codes = sample_codes(prior, prompts, nulls, torch.arange(2), layout.length, layout.num_codes, options)
    assert codes.shape == (2, 16) and codes.max() < layout.num_codes
    plain = prior.generate(prompts, do_sample=True)[:, layout.prompt_length :]  # stock transformers
    assert plain.shape == (2, 16) and plain.max() < layout.num_codes


def test_grids_show_prompts_of_validation_images(prior, config, store, root):
    layout = TokenLayout.from_pretrained(config.output_dir)
    columns, prompts, names = grid_rows(store, layout, 6)
    rows = conditioned.write_data(root / "again")["validation"]
    expected = [
        [("left", "right")[label], conditioned.STYLES[style]]
        for label, style in zip(rows["label"], rows["style"], strict=True)
    ]
    assert columns == 1 and prompts.shape == (6, layout.prompt_length)
    assert all(
        word in name for name, text in zip(names, rows["text"], strict=True) for word in (text or "").split()[:1]
    )
    assert [name.split(" · ")[-2:] for name in names] == expected
    assert len(list((root / "run" / "prior" / "samples").glob("*.png"))) == 1


def test_the_card_names_the_conditions(prior, root):
    card = prior_card(root / "run" / "prior", "me/prior", "mit")
    layout = TokenLayout.from_pretrained(root / "run" / "prior")
    assert all(segment.summary in card for segment in layout.conditions)
    assert "### Classes of style" in card and f"[:, {layout.prompt_length}:]" in card
    line = next(line for line in card.splitlines() if line.startswith("prompt = "))
    assert eval(line.partition("=")[2]).shape == (4, layout.prompt_length)


@pytest.mark.parametrize(
    "file, content", [("text/tokenizer.json", None), ("text/tokenizer.json", "{}"), ("twin/config.json", None)]
)
def test_a_store_without_its_tokenizers_is_refused(prior, config, tmp_path, file, content):
    shutil.copytree(config.code_store, tmp_path / "codes")
    path = tmp_path / "codes" / "conditions" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match="this file is missing" if content is None else "holds the tokenizer"):
        open_codes(dataclasses.replace(config, code_store=str(tmp_path / "codes")))


def test_other_settings_than_those_of_the_store_are_refused(prior, config, root):
    changes = {"gray": {"transform": "edges"}, "text": {**ALL["text"], "max_tokens": 5}}
    for name, condition in changes.items():
        other = settings(
            root, "run", {**CONDITIONS, "twin": dataclasses.asdict(config.conditions["twin"]), name: condition}
        )
        with pytest.raises(ConfigError, match=rf"conditions\.{name}\.\w+: .* was written with"):
            open_codes(other)
    with pytest.raises(ConfigError, match="conditions"):
        open_codes(dataclasses.replace(config, conditions={}))
    given = {**config.conditions, "twin": dataclasses.replace(config.conditions["twin"], tokenizer=str(root / "vqgan"))}
    with pytest.raises(ConfigError, match=r"conditions\.twin\.tokenizer: .* holds tokens of another"):
        open_codes(dataclasses.replace(config, conditions=given))


def test_a_prior_with_other_conditions_goes_on(prior, config):
    """Conditions of the same name and tokenizer keep their embeddings; a new one starts untrained."""
    known = TokenLayout.from_pretrained(config.output_dir)
    other = dataclasses.replace(known, segments=(known.segments[1],))
    adapted = adapt_prior(config.output_dir, {}, other)
    old, new = (p.get_input_embeddings().weight.to("cpu") for p in (prior, adapted))
    text = known.segments[1].num_tokens
    first = known.first_tokens["text"], other.first_tokens["text"]
    assert torch.equal(new[first[1] : first[1] + text], old[first[0] : first[0] + text])
    assert torch.equal(new[: known.num_codes], old[: known.num_codes])


# ---------------------------------------------------------------------- from a language model


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def language_model(request, tmp_path_factory):
    """A folder with a tiny language model and its tokenizer, as on the Hub."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_text_tokenizer(["a red circle", "a blue square"] * 3, 290)
    torch.manual_seed(0)
    sizes = {"gpt2": {"n_positions": 64}, "qwen3": {"tie_word_embeddings": True}}[request.param]
    fields = {**tiny.RANDOM_PRIORS[request.param], **sizes, "vocab_size": 320, "eos_token_id": 5, "bos_token_id": 5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def with_text_of(root, folder, name):
    conditions = {"text": {"kind": "text", "column": "text", "max_tokens": 6, "tokenizer": str(folder)}}
    config = settings(root, name, conditions, model={}, model_name_or_path=str(folder))
    if not (root / name / "codes" / "manifest.json").is_file():
        tokenize(config)
    return config


@torch.no_grad()
def test_a_language_model_still_reads_its_text(root, language_model):
    config = with_text_of(root, language_model, language_model.name)
    layout = open_codes(config)[1]
    prior = initial_prior(config, layout).eval()
    known = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).eval()
    first, tokens = layout.first_tokens["text"], vocabulary_size(load_text_tokenizer(language_model))
    assert tokens == layout.segments[0].num_tokens
    ids = torch.randint(tokens, (3, 12), generator=torch.Generator().manual_seed(1))
    logits = prior(input_ids=ids + first).logits
    assert logits.shape[-1] == layout.vocab_size and prior.dtype == torch.float32
    torch.testing.assert_close(logits[..., first : first + tokens], known(input_ids=ids).logits[..., :tokens])
    assert prior.generation_config.eos_token_id is None and prior.config.eos_token_id is None


def test_a_prior_from_a_language_model_is_trained_and_saved(root, language_model):
    config = with_text_of(root, language_model, language_model.name)
    prior = train(config)
    loaded = load_prior(config.output_dir)
    assert loaded.config.vocab_size == prior.config.vocab_size
    saved = (root / language_model.name / "prior" / "conditions" / "text" / "tokenizer.json").read_bytes()
    assert saved == (language_model / "tokenizer.json").read_bytes()


def test_a_language_model_needs_a_text_of_its_tokenizer(root, language_model, layout, tmp_path):
    config = with_text_of(root, language_model, language_model.name)
    with pytest.raises(ConfigError, match="it can only start a prior with a text condition of its tokenizer"):
        initial_prior(config, layout)
    own = open_codes(config)[1]
    with pytest.raises(ConfigError, match=r"model\.hidden_size: received 48, but .* has 32"):
        initial_prior(dataclasses.replace(config, model={"hidden_size": 48}), own)
    with pytest.raises(ConfigError, match=r"lora\.r: .* is a language model"):
        initial_prior(dataclasses.replace(config, lora=dataclasses.replace(config.lora, r=2)), own)
    shutil.copytree(language_model, tmp_path / "small")
    values = json.loads((tmp_path / "small" / "config.json").read_text())
    if values["model_type"] == "gpt2":
        long = dataclasses.replace(own, grid=(8, 8), grids=())
        with pytest.raises(ConfigError, match="position embeddings are for 64 tokens; these sequences have 70"):
            initial_prior(config, long)


def test_a_folder_without_layout_and_tokenizer_is_no_language_model(root, layout, tmp_path):
    build_prior(tiny.LLAMA, layout).save_pretrained(tmp_path)
    config = settings(root, "none", {}, model={}, model_name_or_path=str(tmp_path))
    with pytest.raises(ConfigError, match="it holds no trained prior"):
        initial_prior(config, layout)
