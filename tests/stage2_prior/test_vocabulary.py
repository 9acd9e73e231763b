"""The token layout: the meaning of tokens, labels to tokens, and saving as JSON."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from stage2_prior import TokenLayout


def make(num_codes: int, num_classes: int, grid: tuple[int, int] = (4, 4), factor: int = 4) -> TokenLayout:
    return TokenLayout(num_codes, tuple(f"class {n}" for n in range(num_classes)), grid, factor, "0123456789abcdef")


@pytest.mark.parametrize(
    ("num_codes", "num_classes", "null", "vocab_size"),
    [
        (32, 10, 42, 64),
        (256, 10, 266, 320),
        (53, 10, 63, 64),
        (54, 10, 64, 128),
        (64, 0, 64, 128),
        (1024, 1000, 2024, 2048),
    ],
)
def test_segments_follow_one_another(num_codes, num_classes, null, vocab_size):
    layout = make(num_codes, num_classes)
    assert (layout.null_token, layout.vocab_size) == (null, vocab_size)
    segments = layout.to_dict()["tokens"]
    assert list(segments) == ["codes", "classes", "null", "padding"]
    assert list(segments.values()) == [num_codes, num_classes, 1, vocab_size - null - 1]
    assert layout.class_tokens(torch.arange(num_classes)).tolist() == list(range(num_codes, null))


@pytest.mark.parametrize(("grid", "factor"), [((4, 4), 4), ((16, 16), 16), ((8, 6), 2)])
def test_codes_and_pixels_of_an_image(grid, factor):
    layout = make(32, 0, grid, factor)
    image = np.zeros((grid[0] * factor, grid[1] * factor))
    assert layout.length == image[::factor, ::factor].size
    assert layout.pixels == image.size


def test_labels_are_ids_or_names(layout):
    labels = [0, "elk", np.int64(2), "bee", np.uint8(3), 4]
    assert layout.class_ids(labels).tolist() == [0, 4, 2, 1, 3, 4]
    assert layout.class_ids(labels).dtype == torch.int64
    assert layout.class_ids(np.array([3, 1])).tolist() == [3, 1]


def test_a_name_that_looks_like_a_number_is_a_name():
    assert TokenLayout(32, ("9", "8"), (4, 4), 4, "").class_ids(["8", 0]).tolist() == [1, 0]


@pytest.mark.parametrize("names", [("1", "2", "3"), ("01", "02", "03"), ("3", "2", "1")])
def test_a_number_with_two_readings_is_refused(names):
    """Such as the id 1 of the class "2", while another class is named "1"."""
    layout = TokenLayout(32, names, (4, 4), 4, "")
    assert layout.class_ids(list(names)).tolist() == [0, 1, 2]
    number = 1 if names[0] != "3" else 2
    other, of_id = next(name for name in names if int(name) == number), names[number]
    with pytest.raises(ValueError, match=rf"received {number}, which has two readings: class '{other}' .* '{of_id}'"):
        layout.class_ids([number])


def test_a_number_that_is_its_own_name_is_an_id():
    assert TokenLayout(32, ("0", "1", "2"), (4, 4), 4, "").class_ids([2, np.int64(0)]).tolist() == [2, 0]


def test_names_are_the_same_in_every_unicode_form():
    for saved, asked in itertools.product(["caf\u00e9", "cafe\u0301"], repeat=2):
        assert TokenLayout(32, ("tea", saved), (4, 4), 4, "").class_ids([asked]).tolist() == [1]


@pytest.mark.parametrize("label", [5, -1, True, np.True_, 1.0, "fox", "", None], ids=repr)
def test_other_labels_are_refused(layout, label):
    with pytest.raises(ValueError, match=r"class_labels: received .* 0 to 4 or names: ant, bee, cat, dog, elk"):
        layout.class_ids([0, label])


def test_a_misspelt_name_is_answered_with_the_nearest_ones_and_few_others():
    names = ("cats", "dogs", *(f"bird number {n} with a long name" for n in range(1000)))
    with pytest.raises(ValueError) as caught:
        TokenLayout(32, names, (4, 4), 4, "").class_ids(["Cats"])
    message = str(caught.value)
    assert message.endswith("with a long name and 992 more; did you mean 'cats'?") and len(message) < 500
    with pytest.raises(ValueError, match=r"names: ant, bee, cat, dog, elk; did you mean 'dog'\?$"):
        TokenLayout(32, ("ant", "bee", "cat", "dog", "elk"), (4, 4), 4, "").class_ids(["doge"])
    with pytest.raises(ValueError, match="did you mean 'sea lion' or 'sea lions'"):
        TokenLayout(32, ("sea lion", "wolf", "sea lions"), (4, 4), 4, "").class_ids(["sea lian"])


def test_an_unconditional_layout_has_no_labels():
    with pytest.raises(ValueError, match="num_images"):
        make(32, 0).class_ids([0])


@pytest.mark.parametrize("num_classes", [0, 3])
def test_round_trips(tmp_path, num_classes):
    layout = make(300, num_classes, (8, 6))
    assert TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    layout.save_pretrained(tmp_path)
    assert TokenLayout.from_pretrained(tmp_path) == layout


def test_the_file_of_a_layout_with_one_code_at_each_position(tmp_path):
    """Files of earlier versions have these bytes."""
    TokenLayout(32, ("cat", "dog"), (4, 6), 8, "0123456789abcdef", True, (3, 4)).save_pretrained(tmp_path)
    assert (tmp_path / "token_layout.json").read_text() == (
        '{\n  "tokens": {\n    "codes": 32,\n    "classes": 2,\n    "null": 1,\n    "padding": 29\n  },'
        '\n  "num_codes": 32,\n  "class_names": [\n    "cat",\n    "dog"\n  ],\n  "grid": [\n    4,\n    6\n  ],'
        '\n  "downsampling_factor": 8,\n  "tokenizer_fingerprint": "0123456789abcdef",\n  "has_null": true,'
        '\n  "class_counts": [\n    3,\n    4\n  ]\n}\n'
    )
    one_code = TokenLayout(32, ("cat", "dog"), (4, 6), 8, "0123456789abcdef", grids=((4, 6, 1),))
    assert one_code == TokenLayout.from_pretrained(tmp_path) and one_code.grids == ()


@pytest.mark.parametrize(
    ("grids", "length", "shape", "text"),
    [
        (((4, 6, 3),), 72, (4, 6, 3), "4×6×3"),
        (((2, 3, 1), (4, 6, 1)), 30, (30,), "2×3 and 4×6"),
        (((2, 3, 2), (4, 6, 1)), 36, (36,), "2×3×2 and 4×6"),
    ],
)
def test_several_codes_at_a_position_and_several_grids(tmp_path, grids, length, shape, text):
    layout = TokenLayout(32, (), (4, 6), 8, "", grids=grids)
    assert (layout.length, layout.codes_shape, layout.codes_text) == (length, shape, text)
    assert layout.pixels == 32 * 48 and layout.all_grids == grids and layout.vocab_size == 64
    layout.save_pretrained(tmp_path)
    assert TokenLayout.from_pretrained(tmp_path) == layout != make(32, 0, (4, 6), 8)
    for other in (((4, 6),), ((6, 4, 1),), 3, ((4, 6, 0),), ((4, 6, 1), (2, 3, 1))):
        with pytest.raises(ValueError, match="grids: received"):
            dataclasses.replace(layout, grids=other)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_codes", value) for value in (0, -1, 1.5, "32", True, None, [32])),
        *(("downsampling_factor", value) for value in (0, "4", None)),
        *(("grid", value) for value in ([4], [4, 4, 4], [0, 4], ["4", 4], 4, None)),
        *(("class_names", value) for value in ("abc", [1], None, {"a": 1})),
        *(("tokenizer_fingerprint", value) for value in (None, 3)),
        *(("has_null", value) for value in ("yes", 1, None)),
        *(("class_counts", value) for value in ([1, 2, -1], ["1", "2", "3"], 3, None)),
        ("conditions", []),
    ],
    ids=repr,
)
def test_fields_of_another_kind_are_refused(tmp_path, field, value):
    values = {**make(32, 3).to_dict(), field: value}
    with pytest.raises(ValueError, match=rf"token_layout\.{field}(\.\d)?: received"):
        TokenLayout.from_dict(values)
    (tmp_path / "token_layout.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"token_layout\.{field}(\.\d)?: received"):
        TokenLayout.from_pretrained(tmp_path)


def test_counts_are_as_many_as_classes_and_no_part_of_the_meaning(layout):
    counted = dataclasses.replace(layout, class_counts=(1, 0, 3, 4, 5))
    assert counted == layout and TokenLayout.from_dict(counted.to_dict()).class_counts == (1, 0, 3, 4, 5)
    with pytest.raises(ValueError, match="class_counts: received 2 numbers for 5 classes"):
        dataclasses.replace(layout, class_counts=(1, 2))


@pytest.mark.parametrize("field", ["num_codes", "class_names", "grid", "downsampling_factor", "tokenizer_fingerprint"])
def test_missing_fields_are_named(field):
    values = make(32, 3).to_dict()
    del values[field]
    with pytest.raises(ValueError, match=rf"token_layout\.{field}: "):
        TokenLayout.from_dict(values)
