"""The dry run and the first lines of a training: they say what the data hold."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from configs import ConfigError, check, load_config
from configs.opening import num_trained, print_facts, run_facts
from stage1_vqgan import DataConfig, Stage1Config, load_images
from stage1_vqgan.data.__main__ import DataReportConfig, report
from stage1_vqgan.data.overview import data_facts, look
from stage1_vqgan.training.run import train
from tests.image_files import picture, write_folder, write_tar

pytestmark = pytest.mark.usefixtures("datasets_cache")


def facts_in(text):
    """The facts that were printed, by name."""
    facts = {}
    for line in text.splitlines():
        if found := re.match(r"  (\w.*?)  +(\S.*)", line):
            name, facts[name] = found[1], found[2]
        elif line.startswith("   "):
            facts[name] += "\n" + line.strip()
    return facts


@pytest.fixture
def folder(tmp_path):
    """Three classes of 8 images: colours, 16 bits, and other sizes with two files that are no images."""
    root = tmp_path / "images"
    write_folder(root, {f"10/{n}.png": 10 for n in range(8)})
    (root / "9").mkdir()
    (root / "bad").mkdir()
    for n in range(8):
        Image.fromarray(np.full((40, 30), 100 * n, np.uint16)).save(root / "9" / f"{n}.png")
        picture(200, (20, 20)).convert("L").save(root / "bad" / f"{n}.png")
    (root / "bad" / "0.png").write_text("no image")
    (root / "bad" / "1.png").write_bytes(b"")
    return root


def test_the_dry_run_of_a_folder(folder, tmp_path, capsys):
    sheet, data = tmp_path / "sheet.png", {"dataset": str(folder), "validation_fraction": 0.125}
    report(check(DataReportConfig(data=data, model={"image_size": 16}, contact_sheet=str(sheet))))  # type: ignore[arg-type]
    facts = facts_in(capsys.readouterr().out)
    assert facts["images"] == "21 for training, 3 for validation"
    assert facts["classes"] == "3, with these numbers of training images: 9 (7), 10 (7), bad (7)"
    assert facts["looked at"] == "all 21 training images"
    assert facts["sizes"].startswith(
        "8×6 (7), 30×40 (7), 20×20 (6) (width×height); the smallest 8×6, the largest 30×40"
    )
    assert "7 smaller than 16" in facts["sizes"] and facts["modes"] == "RGB (7), I;16 (7), L (6)"
    assert facts["values"] == "uint8 from 5 to 245; uint16 from 100 to 700"
    assert facts["skipped"].startswith(
        "1 of 21 cannot be used; to train without them, set data.max_skipped_fraction to 0.0477:"
    )
    assert facts["skipped"].endswith("1.png: the file is empty")
    assert facts["become"] == "16×16 (crop), channels: 3" and facts["contact sheet"] == str(sheet)
    tiles = np.asarray(Image.open(sheet).convert("RGB"))
    rows = [set(map(tuple, tiles[int((row + 0.5) * len(tiles) / 3), -66 * 6 - 30 :: 66])) for row in range(3)]
    assert rows[1] == {(10, 245, 5)}  # the class 10, all of one colour
    assert all(pixel[0] < 4 for pixel in rows[0]) and (255, 255, 255) in rows[2]  # nearly black; a place left empty


def test_the_number_that_is_suggested_is_enough(folder):
    source = load_images(DataConfig(dataset=str(folder), validation_fraction=0.125))[0]
    looked = look(source, 100, 3)
    for limit, word in [(0.0, "0.0477"), (0.0477, "cannot be used:")]:
        assert word in data_facts(source, source, looked, (16, 16), limit)["skipped"]
    assert len(looked.skipped) <= 0.0477 * len(source)


def test_a_part_of_a_set_is_said_to_be_one(capsys):
    train, validation = load_images(DataConfig(dataset="digits"))
    looked = look(train, 20, 1)
    facts = data_facts(train, validation, looked, (16, 16), 0.01)
    assert facts["looked at"] == "20 images, spread evenly over 1,437 training images" and looked.images == 20
    assert facts["skipped"] == "none of these"
    assert facts["sizes"] == "8×8 (width×height); 20 smaller than 16×16, which are enlarged"


def test_a_stream_is_not_counted(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", range(40), cls=[n % 2 for n in range(40)])
    pair = load_images(DataConfig(dataset=str(tmp_path), validation_split="val", streaming=True))
    facts = data_facts(*pair, look(pair[0], 10, 3), (16, 16), 0.01)
    assert facts["images"] == "an unknown number for training, an unknown number for validation"
    assert facts["looked at"] == "10 images, the first of an unknown number of training images"
    assert facts["classes"] == "an unknown number; 2 in the images looked at: 0 (5), 1 (5)"


def test_many_classes_are_cut_but_not_the_ends(tmp_path):
    layout = {f"{n}/{k}.png": 1 for n in range(60) for k in range(4 + 9 * (n == 50) - 2 * (n == 0))}
    train, validation = load_images(DataConfig(dataset=write_folder(tmp_path, layout)))
    text = data_facts(train, validation, look(train, 1, 3), (8, 8), 0.01)["classes"]
    assert (
        text.startswith("60, with these numbers")
        and ", and 30 more (the fewest 0, 1, " in text
        and "the most 50, 13)" in text
    )


def test_values_without_a_range_are_shown_before_they_are_refused(tmp_path, capsys):
    for n in range(8):
        Image.fromarray(np.full((8, 8), 0.5 + n, np.float32)).save(tmp_path / f"{n}.tif")
    with pytest.raises(ConfigError, match=r"data\.value_range"):
        report(DataReportConfig(data=DataConfig(dataset=str(tmp_path)), contact_sheet=None))
    assert "no range of their own" in facts_in(capsys.readouterr().out)["skipped"]


def test_the_facts_of_a_run():
    config = load_config(
        Stage1Config,
        "digits/stage1",
        {"max_steps": 200, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    )
    facts = run_facts(config, "cpu", 2, {}, 320, "reconstructions")
    assert facts["length"] == "200 steps of 32, 20 epochs" and facts["device"] == "2 × cpu"
    assert facts["logs"].endswith(f"tensorboard --logdir {config.output_dir}")


def test_lines_of_a_fact_stand_below_each_other(capsys):
    print_facts({"a": "one", "longer": "two\nthree"})
    assert capsys.readouterr().out == "  a       one\n  longer  two\n            three\n"


def test_a_training_says_the_same_first(tiny_runs, capsys, tmp_path):
    config = check(tiny_runs.stage1)
    config.output_dir, config.max_steps = str(tmp_path / "run"), 1
    model = train(check(config)).requires_grad_(True)
    facts = facts_in(capsys.readouterr().out)
    assert facts["images"] == "1,437 for training, 360 for validation" and "0 (136), 1 (154)" in facts["classes"]
    assert facts["parameters"] == f"tokenizer {num_trained(model):,}"  # it ends before the discriminator would start
    assert facts["pictures"].startswith(f"{tmp_path / 'run'}/reconstructions")
    assert re.fullmatch(r"(\d+)×\1 \(crop\), channels: 1", facts["become"])


def test_a_training_without_a_usable_image_ends_at_once(tiny_runs, tmp_path):
    config = replace(check(tiny_runs.stage1), output_dir=str(tmp_path / "run"), dataloader_num_workers=1)
    config.model = {**config.model, "in_channels": 5}
    with pytest.raises(ConfigError, match=r"data.dataset: none of 32 images can be used; .*, but the tokenizer has 5"):
        train(check(config))
