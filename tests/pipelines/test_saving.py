"""Saving a pipeline destroys nothing: the author's words stay, and a folder that holds something else is refused."""

import json
import shutil

import pytest
import torch

from configs import ConfigError
from configs.card import front_matter
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.hub import model_card
from stage1_vqgan import load_tokenizer
from stage2_prior import TokenLayout


@pytest.fixture
def folder(tiny_runs, tmp_path):
    return shutil.copytree(tiny_runs.pipeline, tmp_path / "pipeline")


def test_words_of_the_author_stay(folder):
    pipeline = VQGANPipeline.from_pretrained(folder)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("## Limits\n", "## Limits\n\nOnly my handwriting.\n"))
    (folder / "notes.txt").write_text("mine")
    pipeline.save_pretrained(folder)
    assert (folder / "README.md").read_text() == card.replace("## Limits\n", "## Limits\n\nOnly my handwriting.\n")
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "README.md").write_text("# By hand\n")
    pipeline.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "# By hand\n"


def test_facts_stay_with_the_weights_that_they_are_about(folder, tmp_path):
    pipeline = VQGANPipeline.from_pretrained(folder)
    (folder / "card" / "metrics.json").write_text('{"psnr": 16.5, "data": "digits"}')
    pipeline.save_pretrained(tmp_path / "copy")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "| Optimizer steps | 10 | 20 |" in card and "| `psnr` | 16.5 |" in card
    assert front_matter(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 16.5
    with torch.no_grad():
        pipeline.prior.lm_head.weight += 1
    for place in (folder, tmp_path / "copy", tmp_path / "new"):
        pipeline.save_pretrained(place)
        card = (place / "README.md").read_text()
        assert "Optimizer steps" not in card and "16.5" not in card and "model-index" not in card
        assert not (place / "card").exists()


OTHERS = {
    "pictures": ("cat.jpg", "", "holds cat.jpg, but no pipeline"),
    "tokenizer": ("config.json", "{}", "holds config.json, but no pipeline"),
    "diffusers": ("model_index.json", '{"_class_name": "DDPMPipeline"}', "'DDPMPipeline' of another library"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_that_holds_something_else_is_refused(tiny_runs, tiny_pipeline, tmp_path, other):
    name, text, message = OTHERS[other]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.save_pretrained(tmp_path)
    parts = {"tokenizer": str(tiny_runs.vqgan), "prior": str(tiny_runs.prior), "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=f"output_dir: received .*{message}"):
        build(BuildConfig(**parts))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text


def test_a_readme_and_a_license_may_be_there(tiny_pipeline, tmp_path):
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (tmp_path / name).write_text("mine")
    tiny_pipeline.save_pretrained(tmp_path)
    assert VQGANPipeline.from_pretrained(tmp_path).class_names == tiny_pipeline.class_names
    assert all((tmp_path / name).read_text() == "mine" for name in ("README.md", "LICENSE", ".gitattributes"))


def test_examples_use_a_class_that_has_images(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["token_layout"]["class_counts"] = [0, 0, 0, 7, 0, 1, 1, 1, 1, 1]
    (folder / "model_index.json").write_text(json.dumps(index))
    layout = TokenLayout.from_dict(index["token_layout"])
    card = model_card(folder, "me/digits", "mit")
    assert "generate(class_labels=[3]," in card and f"torch.full((4, 1), {layout.num_codes + 3})  # class 3, 3" in card
    assert "| 0 | 0 | 0 |" in card and "| 3 | 3 | 7 |" in card


def test_a_pipeline_is_no_tokenizer(folder):
    with pytest.raises(ConfigError, match="this folder holds a pipeline; its tokenizer is in vqgan"):
        load_tokenizer(str(folder))
