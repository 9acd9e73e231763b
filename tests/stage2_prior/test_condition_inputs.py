"""What conditions are made of: transforms of images, against Pillow and SciPy; texts, against transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import sobel
from transformers import PreTrainedTokenizerFast

from stage1_vqgan import normalize, to_shape
from stage2_prior.condition_images import apply_transform, condition_pixels, transformed_shape
from stage2_prior.condition_text import (
    decode_text,
    encode_texts,
    load_text_tokenizer,
    save_text_tokenizer,
    text_fingerprint,
    text_tokens,
    train_text_tokenizer,
    vocabulary_size,
)
from stage2_prior.conditions import Segment

CAPTIONS = ["a red circle", "a blue square", "grinning face with smiling eyes", "flag: Türkiye", "", None] * 5


@pytest.fixture(scope="module")
def levels():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def changed(transform, levels):
    """The levels of the transform of an image, uint8 `(H, W, C)`."""
    pixels = normalize(torch.from_numpy(levels).permute(2, 0, 1)[None])
    found = apply_transform(transform, pixels)[0].permute(1, 2, 0).numpy()
    values = (found + 1) * 127.5
    assert np.abs(values - values.round()).max() < 1e-4  # levels of an image file
    return values.round().astype(np.uint8)


def assert_close(found, expected):
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1  # Pillow computes in whole numbers


def test_gray_is_the_brightness(levels):
    expected = np.asarray(Image.fromarray(levels).convert("L"))[:, :, None].repeat(3, 2)
    assert_close(changed("gray", levels), expected)


@pytest.mark.parametrize("factor", [2, 4])
def test_downscale_is_the_mean_of_blocks(levels, factor):
    assert_close(changed(f"downscale {factor}", levels), np.asarray(Image.fromarray(levels).reduce(factor)))
    assert transformed_shape(f"downscale {factor}", (12, 16)) == (12 // factor, 16 // factor)


def test_edges_are_those_of_sobel(levels):
    gray = levels @ np.array([0.299, 0.587, 0.114])
    strength = np.hypot(*(sobel(gray, axis, mode="nearest") / 8 for axis in (0, 1)))
    assert_close(changed("edges", levels), (255 - 2 * strength).clip(0, 255).round()[:, :, None].repeat(3, 2))


def test_a_step_from_black_to_white_is_a_black_line():
    step = np.zeros((4, 8, 1), dtype=np.uint8)
    step[:, 4:] = 255
    assert changed("edges", step)[0, :, 0].tolist() == [255, 255, 255, 0, 0, 255, 255, 255]


def test_mask_hides_the_centre_and_nothing_else(levels):
    found = changed("mask 0.5", levels)
    hidden = np.zeros((12, 16), bool)
    hidden[3:9, 4:12] = True
    assert (found[hidden] == 128).all() and (found[~hidden] == levels[~hidden]).all()


@pytest.mark.parametrize(
    "transform, message",
    [
        ("grey", "received 'grey'; allowed are downscale, gray, edges, mask"),
        ("downscale", "downscale needs a whole number from 2 up"),
        ("downscale 2.5", "downscale needs a whole number from 2 up"),
        ("downscale nan", "downscale needs a whole number from 2 up"),
        ("downscale 5", "5 must divide height and width of the images, 12 and 16"),
        ("mask 1", "mask needs a share above 0 and below 1"),
        ("gray 2", "gray takes no number; write 'gray'"),
    ],
)
def test_other_transforms_are_refused(levels, transform, message):
    with pytest.raises(ValueError, match=f"transform: .*{message}"):
        changed(transform, levels)


def test_only_colours_can_be_removed(levels):
    with pytest.raises(ValueError, match="1 channels; only images with 3 have colours"):
        changed("gray", levels[:, :, :1])


def image_segment(transform, height, width):
    return Segment("sketch", "image", 8, 4, grids=((2, 2, 1),), image_shape=(height, width), transform=transform)


@pytest.mark.parametrize("transform", ["gray", "mask 0.5"])
def test_a_transformed_image_is_not_changed_again(levels, transform):
    segment = image_segment(transform, 12, 16)
    made = changed(transform, levels)
    again = condition_pixels(torch.from_numpy(made), segment)
    assert torch.equal(again, normalize(torch.from_numpy(made).permute(2, 0, 1)))
    assert torch.equal(again, condition_pixels(torch.from_numpy(levels), segment))


def test_an_image_of_the_size_of_the_training_is_scaled_down_as_there(levels):
    segment = image_segment("downscale 2", 6, 8)
    small = changed("downscale 2", levels)
    expected = normalize(torch.from_numpy(small).permute(2, 0, 1))
    assert torch.equal(condition_pixels(torch.from_numpy(levels), segment), expected)
    assert torch.equal(condition_pixels(torch.from_numpy(small), segment), expected)
    large = torch.from_numpy(levels).repeat_interleave(2, 0).repeat_interleave(2, 1)
    found = condition_pixels(large, segment)  # resized to the size of the training first
    assert torch.equal(found, condition_pixels(to_shape(large, (12, 16)), segment))


def test_edges_need_a_drawing(levels):
    segment = image_segment("edges", 12, 16)
    drawing = torch.from_numpy(changed("edges", levels))
    assert torch.equal(condition_pixels(drawing, segment), normalize(drawing.permute(2, 0, 1)))
    noisy = (drawing.int() + torch.randint(-9, 10, drawing.shape)).clamp(0, 255).to(torch.uint8)
    assert condition_pixels(noisy, segment).shape == (3, 12, 16)
    with pytest.raises(ValueError, match=r"received an image with colours; 'sketch' is a drawing, .* apply_transform"):
        condition_pixels(torch.from_numpy(levels), segment)


@pytest.fixture(scope="module")
def trained():
    return train_text_tokenizer(CAPTIONS, 300)


def test_a_trained_tokenizer_writes_every_text(trained):
    assert 256 < vocabulary_size(trained) <= 300
    assert trained.to_str() == train_text_tokenizer(CAPTIONS, 300).to_str()
    segment = Segment("text", "text", 300, 40)
    for text in ("a red circle", "ein Käse 漢字 🎉", " two  spaces "):
        (ids,) = encode_texts(trained, [text], segment).tolist()
        assert decode_text(trained, ids, segment) == text
    assert len(text_tokens(trained, ["a red circle"])[0]) < len("a red circle")  # it has learnt the captions


def test_texts_are_cut_and_padded_with_the_null_token(trained):
    segment = Segment("text", "text", 300, 5)
    whole = text_tokens(trained, CAPTIONS[:6])
    ids = encode_texts(trained, CAPTIONS[:6], segment)
    assert ids.shape == (6, 5) and ids.dtype == torch.int64
    assert {len(tokens) > 5 for tokens in whole} == {True, False}
    for row, tokens in zip(ids.tolist(), whole, strict=True):
        assert row == [*tokens[:5], *[300] * (5 - len(tokens))]
    assert ids[4:].tolist() == [[300] * 5] * 2  # an empty text, and none


def test_a_tokenizer_of_transformers_gives_the_same_tokens(trained, tmp_path):
    """Its file may say that texts are cut, padded and framed by special tokens; a condition has its own places."""
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<end>", pad_token="<pad>")
    fast.backend_tokenizer.enable_truncation(2)
    fast.backend_tokenizer.enable_padding(length=9, pad_id=fast.pad_token_id)
    fast.save_pretrained(tmp_path)
    loaded = load_text_tokenizer(tmp_path)
    assert vocabulary_size(loaded) == len(fast) == vocabulary_size(trained) + 2
    plain = PreTrainedTokenizerFast(tokenizer_object=trained)
    texts = [text for text in CAPTIONS[:6] if text]
    assert text_tokens(loaded, texts) == plain(texts, add_special_tokens=False)["input_ids"]


def test_a_saved_tokenizer_keeps_its_fingerprint(trained, tmp_path):
    text = trained.to_str()
    save_text_tokenizer(text, tmp_path / "text")
    assert load_text_tokenizer(tmp_path / "text").to_str() == text
    assert text_fingerprint((tmp_path / "text" / "tokenizer.json").read_text()) == text_fingerprint(text)


@pytest.mark.parametrize("content", [b"{}", b"\xff\xfe", b"[1, 2", b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: this file is not (a tokenizer|JSON)"):
        load_text_tokenizer(tmp_path)
