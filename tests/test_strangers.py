"""Folders of strangers, and mistakes, that would change or remove files of the user."""

import json
import os
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from configs.checksums import checksum
from configs.files import read_json, write_text
from configs.folder_lock import locked_folder
from configs.staging import finish_interrupted, replaced_files
from stage1_vqgan import DataConfig, load_images
from stage1_vqgan.data.columns import encoded
from stage1_vqgan.data.indexed import ImageSource


def _journal(folder: Path, *names: str) -> None:
    (folder / ".saved").mkdir(parents=True)
    (folder / ".saved/files.json").write_text(json.dumps({"files": names}))


def test_a_journal_changes_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    other, model = tmp_path / "other", tmp_path / "model"
    other.mkdir()
    (other / "model.safetensors").write_text("precious")
    _journal(model, "../other/new")
    with pytest.raises(ValueError):
        finish_interrupted(model)
    assert (other / "model.safetensors").read_text() == "precious"


def test_a_journal_moves_no_file_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a").write_text("precious")
    _journal(tmp_path / "model", "sub/a")
    (tmp_path / "model/.saved/sub").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError):
        finish_interrupted(tmp_path / "model")
    assert (tmp_path / "mine/a").read_text() == "precious"


@pytest.mark.parametrize("content", ["{}", '{"files": 3}', '{"files": [3]}'])
def test_a_malformed_journal_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / ".saved").mkdir()
    (tmp_path / ".saved/files.json").write_text(content)
    with pytest.raises(ValueError, match=r"files\.json"):
        finish_interrupted(tmp_path)


def test_a_link_in_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    mine, model = tmp_path / "mine", tmp_path / "model"
    mine.mkdir()
    model.mkdir()
    (mine / "a").write_text("precious")
    (model / ".saving").symlink_to(mine)
    try:
        with replaced_files(model) as staged:
            (staged / "config.json").write_text("{}")
    except (OSError, ValueError):
        pass
    assert (mine / "a").read_text() == "precious"


@pytest.mark.parametrize("name", ["config.yaml.partial", ".holder.json"])
def test_a_planted_link_is_not_written_through(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path / "mine")
    try:
        with locked_folder(run, "output_dir"):
            write_text(run / "config.yaml", "a: 1\n")
    except (OSError, ValueError):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_the_model_of_a_run_survives_a_pipeline_in_its_folder(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "train_results.json"):
        (tmp_path / name).write_text("{}")
    try:
        with replaced_files(tmp_path) as staged:
            (staged / "model_index.json").write_text("{}")
    except (OSError, ValueError):
        pass
    assert (tmp_path / "model.safetensors").is_file()


def test_a_changed_file_with_its_old_time_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    before, times = checksum(path), path.stat()
    path.write_text("new")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert checksum(path) != before


def test_json_is_not_read_from_a_device(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("/dev/null")
    with pytest.raises(ValueError, match="regular file"):
        read_json(tmp_path / "a.json")


def test_a_row_without_bytes_and_path_is_an_empty_image() -> None:
    assert encoded({"bytes": None, "path": None}, 0, True).content == b""


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_a_parquet_file_opens_no_other_file(tmp_path: Path, datasets_cache: None, streaming: bool) -> None:
    """Otherwise a stranger's data set could train a model on any picture of this machine, or open addresses."""
    secret, data = tmp_path / "secret.png", tmp_path / "data"
    data.mkdir()
    Image.new("L", (16, 16), 200).save(secret)
    rows = [{"bytes": secret.read_bytes(), "path": "own.png"}, {"bytes": None, "path": str(secret)}]
    rows += [{"bytes": None, "path": "http://example.org/a.png"}, {"bytes": None, "path": None}]
    table = pyarrow.table(
        {"image": pyarrow.array(rows, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))}
    )
    pyarrow.parquet.write_table(table, data / "train.parquet")
    config = DataConfig(
        dataset=str(data), image_column="image", validation_split=None, validation_fraction=0.25, streaming=streaming
    )
    found = []
    for source in load_images(config):
        if isinstance(source, ImageSource):
            found += source.encoded(range(len(source)))
        else:
            found += [image for image, _ in source.read()]
    assert sorted(len(image.content) for image in found) == [0, 0, 0, len(secret.read_bytes())]
