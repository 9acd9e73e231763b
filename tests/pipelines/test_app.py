"""The demo app without its page: what it does with requests, and which it refuses."""

import io
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from configs import ConfigError
from pipelines.app import AppConfig, main
from pipelines.demo import actions
from pipelines.demo.mosaic import code_colours, mosaic


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG of this size, without its pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(images: list[tuple[Image.Image, str]]) -> list[list[int]]:
    return [np.asarray(image).ravel().tolist() for image, _ in images]


def captions(images: list[tuple[Image.Image, str]]) -> list[str]:
    return [caption for _, caption in images]


# ---------------------------------------------------------------------- generate


def test_an_image_can_be_asked_for_again_by_its_caption(tiny_pipeline):
    images = actions.generate(tiny_pipeline, 8, [3, 7], 2, 41, 1.5, temperature=0.9)
    assert captions(images) == ["3 · seed 41", "3 · seed 42", "7 · seed 43", "7 · seed 44"]
    again = actions.generate(tiny_pipeline, 8, [7], 1, 44, 1.5, temperature=0.9)
    assert pixels(again) == pixels(images)[3:]
    (direct,) = tiny_pipeline.generate("7", seed=44, guidance_scale=1.5, temperature=0.9).images
    assert np.array_equal(direct, images[3][0])
    assert len({tuple(values) for values in pixels(images)}) > 2  # not one image for each class


def test_images_of_no_class_are_not_guided(tiny_pipeline):
    images = actions.generate(tiny_pipeline, 8, [], 2, 5, 3.0)
    assert captions(images) == ["seed 5", "seed 6"]
    assert pixels(images) == pixels(actions.generate(tiny_pipeline, 8, [], 2, 5, 1.0))


def test_progress_counts_codes_of_all_images(tiny_pipeline):
    reports: list[tuple[int, int]] = []
    actions.generate(tiny_pipeline, 8, [1, 2], 3, 0, 1.5, lambda done, total: reports.append((done, total)))
    length = tiny_pipeline.layout.length
    assert reports == [(6 * step, 6 * length) for step in range(1, length + 1)]


@pytest.mark.parametrize(
    "classes, count, seed, message",
    [
        ([1, 2, 3], 3, 0, "3 classes with 3 images each are too many; allowed are 8 images"),
        ([], 9, 0, "images: received 9; must be a whole number from 1 to 8"),
        ([1], 0, 0, "images: received 0"),
        ([1], 1, -1, "seed: received -1; must be a whole number from 0 to 4294967295"),
        ([1], 1, None, "seed: received None"),
        ([77], 1, 0, "class_labels: received 77"),
    ],
)
def test_a_wrong_request_is_refused(tiny_pipeline, classes, count, seed, message):
    with pytest.raises(ValueError) as caught:
        actions.generate(tiny_pipeline, 8, classes, count, seed, 1.5)
    assert message in str(caught.value)


def test_a_prior_that_needs_a_class_asks_for_one(tiny_pipeline, monkeypatch):
    layout = replace(tiny_pipeline.layout, has_null=False)
    monkeypatch.setattr(tiny_pipeline, "layout", layout)
    assert not actions.can_guide(tiny_pipeline)
    with pytest.raises(ValueError, match="Choose at least one class"):
        actions.generate(tiny_pipeline, 8, [], 1, 0, 1.0)
    assert len(actions.generate(tiny_pipeline, 8, [1], 1, 0, 1.0)) == 1


# ---------------------------------------------------------------------- reconstruct

SQUARE = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
SIXTEEN_BITS = Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257)
UPLOADS = {
    "gray": (saved(SQUARE), SQUARE),
    "16 bits": (saved(SIXTEEN_BITS), SQUARE),
    "CMYK": (saved(SQUARE.convert("CMYK"), "TIFF"), SQUARE),
    "transparent": (saved(Image.new("RGBA", (16, 16))), Image.new("L", (16, 16), "white")),
    "animation": (saved(SQUARE, "GIF", save_all=True, append_images=[Image.new("L", (16, 16))]), SQUARE),
    "wide": (saved(Image.new("L", (40, 16), 99)), Image.new("L", (16, 16), 99)),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_an_upload_is_shown_as_the_tokenizer_sees_it(tiny_pipeline, case):
    content, expected = UPLOADS[case]
    result = actions.reconstruct(tiny_pipeline, content)
    assert np.array_equal(result.original, expected)
    assert np.array_equal(result.reconstruction, tiny_pipeline.reconstruct(expected)[0])
    assert ("; the first of 2 frames" in result.facts) == (case == "animation")


def test_the_facts_about_an_upload(tiny_pipeline):
    result = actions.reconstruct(tiny_pipeline, UPLOADS["gray"][0])
    codes = tiny_pipeline.encode(SQUARE)[0].cpu().numpy()
    assert f"16 in a grid of 4×4; {len(set(codes.ravel().tolist()))} different ones of the 32" in result.facts
    squared = (np.asarray(result.original, float) - np.asarray(result.reconstruction, float)) ** 2
    (stated,) = [float(word) for word in result.facts.rpartition("PSNR")[2].split() if word[0].isdigit()]
    assert stated == pytest.approx(10 * np.log10(255**2 / squared.mean()), abs=0.1)  # the pictures have 8 bits
    assert np.array_equal(result.mosaic, mosaic(codes))


NO_IMAGES = {
    "no upload": (None, "Choose an image first."),
    "empty": (b"", "the file is empty"),
    "text": (b"hello", "no image format"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "no image format"),
    "truncated": (saved(Image.effect_noise((64, 64), 99))[:2000], "truncated"),
    "bomb": (png_header(100_000, 100_000), "decompression bomb"),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_is_no_image_is_one_line(tiny_pipeline, case):
    content, message = NO_IMAGES[case]
    with pytest.raises(ValueError) as caught:
        actions.reconstruct(tiny_pipeline, content)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert content is None or "Upload a picture as PNG" in str(caught.value)


# ---------------------------------------------------------------------- mosaic


def test_codes_have_different_colours_that_depend_on_nothing_else():
    colours = code_colours(np.arange(1024).reshape(32, 32))
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 1024
    assert np.array_equal(code_colours(np.array([[700, 3]])), [[colours[21, 28], colours[0, 3]]])
    assert code_colours(np.array([[2**31 - 1]])).shape == (1, 1, 3)
    assert code_colours(np.array([[0, 1]])).tolist() == [[[130, 89, 89], [187, 59, 199]]]  # of today, and of tomorrow


def test_a_mosaic_has_one_tile_for_each_code():
    codes = np.array([[5, 9, 5], [9, 5, 1]])
    picture = np.asarray(mosaic(codes, side=30))
    assert np.array_equal(picture[5::10, 5::10], code_colours(codes)) and picture.shape == (20, 30, 3)
    tiles = np.asarray(mosaic(codes, side=120)).reshape(2, 40, 3, 40, 3).swapaxes(1, 2)  # with numbers
    assert np.array_equal(tiles[:, :, 0, 0], code_colours(codes))
    assert np.array_equal(tiles[0, 0], tiles[1, 1]) and (tiles[0, 0] != tiles[0, 0, 0, 0]).any()


# ---------------------------------------------------------------------- command


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"gradio is not installed: pip install 'tessella\[demo\]'"):
        main(AppConfig(pipeline="nowhere"))
