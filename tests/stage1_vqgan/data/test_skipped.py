"""Images that cannot be decoded are named and recorded once. Too many of them stop the run."""

import json

import pytest
import torch
from accelerate import PartialState, debug_launcher

from configs import ConfigError, check
from stage1_vqgan import DataConfig
from stage1_vqgan.data.dataset import ImageBatch
from stage1_vqgan.data.decoding import SkippedImage
from stage1_vqgan.data.skipped import (
    FILE_NAME,
    MAX_LISTED,
    MAX_WARNINGS,
    SkippedImages,
    smallest_fraction,
    too_many_skipped,
)


def batch(*bad, good=8):
    """A batch with some good images and the given bad ones."""
    skipped = [SkippedImage(number, f"{number}.jpg", f"reason {number}") for number in bad]
    rows = torch.empty(good, 48, dtype=torch.uint8)
    return ImageBatch(rows, [4] * good, [False] * good, 4, 3, torch.arange(good), skipped)


def records(folder):
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_each_image_is_named_and_recorded_once(tmp_path, caplog):
    skipped = SkippedImages(0.5, {"train": 100, "validation": 10}, tmp_path)
    for split, bad in [("train", [5]), ("train", [5, 7]), ("validation", [5]), ("train", [])]:
        skipped.add(split, batch(*bad))
        skipped.exchange()
    assert records(tmp_path) == [
        {"split": split, "image": image, "name": f"{image}.jpg", "reason": f"reason {image}"}
        for split, image in [("train", 5), ("train", 7), ("validation", 5)]
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped 5.jpg of the train images: reason 5",
        "skipped 7.jpg of the train images: reason 7",
        "skipped 5.jpg of the validation images: reason 5",
    ]


def test_warnings_are_limited_and_the_record_is_not(tmp_path, caplog):
    skipped = SkippedImages(1.0, {"train": 1000}, tmp_path)
    skipped.add("train", batch(*range(300)))
    skipped.exchange()
    assert len(caplog.records) == MAX_WARNINGS + 1 and FILE_NAME in caplog.records[-1].getMessage()
    assert len(records(tmp_path)) == 300


def test_a_resumed_run_records_nothing_twice(tmp_path, caplog):
    for bad in ([1, 2], [2, 3]):
        skipped = SkippedImages(0.5, {"train": 100}, tmp_path)
        skipped.add("train", batch(*bad))
        skipped.exchange()
        with open(tmp_path / FILE_NAME, "a") as file:
            file.write('{"split": "train", "ima')  # the process was killed while it wrote
    SkippedImages(0.5, {"train": 100}, tmp_path)
    assert [record["image"] for record in records(tmp_path)] == [1, 2, 3]
    assert len(caplog.records) == 4  # every run logs the images that it skips


def test_too_many_of_a_split(tmp_path):
    skipped = SkippedImages(0.01, {"train": 1000, "validation": 100}, tmp_path)
    skipped.add("train", batch(*range(10)))
    skipped.add("validation", batch(0))
    skipped.exchange()  # 1 % of each is allowed
    skipped.add("train", batch(*range(10)))
    skipped.exchange()  # the same images again
    skipped.add("train", batch(*range(50)))
    with pytest.raises(ConfigError) as caught:
        skipped.exchange()
    (problem,) = caught.value.problems
    assert problem.key == "data.max_skipped_fraction"
    assert "received 0.01, but 50 of the 1,000 train images cannot be used" in problem.message
    assert "(0.05 is enough for these)" in problem.message
    assert problem.message.count(".jpg: reason") == MAX_LISTED
    assert "0.jpg: reason 0" in problem.message and "and 30 more" in problem.message
    assert len(records(tmp_path)) == 51  # recorded before the run stops


@pytest.mark.parametrize(
    ("bad", "total"),
    [(1, 7), (3, 276), (1, 3), (12, 38), (7, 1_281_167), (5, 5), (1, 100), (29, 50), (12_347, 99_999)],
)
def test_the_suggested_fraction_is_enough_and_not_much_more(bad, total):
    fraction = smallest_fraction(bad, total)
    assert bad / total <= float(f"{fraction:g}") <= min(1, 1.01 * bad / total)
    skipped = [SkippedImage(n, str(n), "") for n in range(bad)]
    assert too_many_skipped(skipped, total, fraction, "images") is None
    assert f"({fraction:g} is enough for these)" in too_many_skipped(skipped, total, 0, "images").message


def test_none_allowed_and_all_allowed(tmp_path):
    skipped = SkippedImages(0.0, {"train": 10**6})
    skipped.add("train", batch())
    skipped.exchange()
    skipped.add("train", batch(3))
    with pytest.raises(ConfigError, match=r"received 0, but 1 of the 1,000,000 train images.*\n.*3\.jpg: reason 3"):
        skipped.exchange()
    skipped = SkippedImages(1.0, {"train": 4})
    skipped.add("train", batch(0, 1, 2, 3))
    skipped.exchange()


def test_a_stream_is_counted_as_it_comes():
    skipped = SkippedImages(0.1, {"train": None})
    skipped.add("train", batch(*range(30), good=60))
    skipped.exchange()  # too few images so far for a check
    skipped.add("train", batch(good=300))
    skipped.exchange()  # 30 of 390
    skipped.add("train", batch(*range(30, 50), good=80))
    with pytest.raises(ConfigError, match="50 of the 490 train images seen so far"):
        skipped.exchange()


def _two_processes(folder):
    PartialState._reset_state()  # the fork copied the state of the test process
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    skipped = SkippedImages(0.04, {"train": 100}, folder, state.is_main_process)
    mine = [[0, 1], [1, 2]][state.process_index]
    skipped.add("train", batch(*mine))
    skipped.exchange()
    assert sorted(image for _, image in skipped.found) == [0, 1, 2]
    skipped.add("train", batch(*([3, 4] if state.process_index else [])))
    try:
        skipped.exchange()
    except ConfigError as error:
        with open(f"{folder}/error{state.process_index}", "w") as file:
            file.write(str(error))


def test_processes_count_together(tmp_path):
    debug_launcher(_two_processes, (str(tmp_path),), num_processes=2)
    assert sorted(record["image"] for record in records(tmp_path)) == [0, 1, 2, 3, 4]
    errors = [(tmp_path / f"error{rank}").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1] and "5 of the 100 train images" in errors[0]


def test_the_setting_is_a_fraction():
    for value in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="max_skipped_fraction"):
            check(DataConfig(dataset="digits", max_skipped_fraction=value))
    with pytest.raises(ConfigError, match="aspect_ratio"):
        check(DataConfig(dataset="digits", aspect_ratio="stretch"))
