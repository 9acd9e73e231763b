"""Ten-crop views of a code store, against torchvision's TenCrop, and the configurations that exclude it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import TenCrop

from configs import ConfigError, load_config
from stage1_vqgan import (
    AugmentationConfig,
    DataConfig,
    ImageDataset,
    ImageKey,
    ImageSource,
    Stage1Config,
    VQGANModel,
    decode,
    load_images,
)
from stage1_vqgan.image_processing_pixels import convert_mode, to_pixels
from stage1_vqgan.image_processing_shapes import to_shape
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize
from tests.devices import DEVICE, assert_same_codes

TEN_CROP = AugmentationConfig(ten_crop=True, max_zoom=1.25)


def crops_of_torchvision(image, size, max_zoom, channels, aspect_ratio="crop"):
    """uint8 `(10, C, size, size)` of the image resized to a square of `max_zoom * size` pixels."""
    resized = to_shape(to_pixels(convert_mode(image, channels)), (round(max_zoom * size),) * 2, aspect_ratio)
    return torch.stack(TenCrop(size)(resized.permute(2, 0, 1)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("aspect_ratio", ["crop", "pad"])
@pytest.mark.parametrize(("shape", "size"), [((50, 71), 32), ((20, 13), 16), ((90, 90), 13)])
def test_ten_views_are_the_ten_crops_of_torchvision(channels, aspect_ratio, shape, size):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for _ in range(2)]
    dataset = ImageDataset(
        ImageSource(images, None, None),
        (size, size),
        channels,
        TEN_CROP,
        first_view_plain=True,
        aspect_ratio=aspect_ratio,
    )
    keys = [ImageKey(0, image, view) for image in range(2) for view in range(10)]
    found = (127.5 * (dataset.__getitems__(keys).images() + 1)).round().to(torch.uint8)
    expected = torch.cat([crops_of_torchvision(image, size, 1.25, channels, aspect_ratio) for image in images])
    assert torch.equal(found, expected)
    wide = ImageDataset(
        ImageSource(images, None, None), (size, size + 6), channels, TEN_CROP, aspect_ratio=aspect_ratio
    )
    whole = tuple(round(1.25 * side) for side in (size, size + 6))
    whole = to_shape(to_pixels(convert_mode(images[0], channels)), whole, aspect_ratio).permute(2, 0, 1)
    views = (127.5 * (wide.__getitems__(keys[:10]).images() + 1)).round().to(torch.uint8)
    assert torch.equal(views, torch.stack(TenCrop((size, size + 6))(whole)))
    assert len(found[:10].flatten(1).unique(dim=0)) == 10
    alone = dataset.__getitems__([ImageKey(3, 1, 7)]).images()  # does not depend on the epoch or on other views
    assert torch.equal((127.5 * (alone + 1)).round(), expected[17:18].float())


@torch.no_grad()
def test_a_store_holds_the_codes_of_the_ten_crops(tiny_runs, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (19, 24), dtype=np.uint8)).save(path)
    data = DataConfig(dataset=str(tmp_path / "images"), augmentation=TEN_CROP, validation_fraction=0.25)
    config = replace(tiny_runs.stage2, data=data, num_views=10, code_store=str(tmp_path / "codes"))
    store = tokenize(config)
    train, validation = load_images(data)
    assert (len(store.split("train")), len(store.split("validation"))) == (90, 3)
    assert "93 sequences of 16 codes" in (said := capsys.readouterr().out) and "(93 made now, " in said

    model = VQGANModel.from_pretrained(tiny_runs.vqgan).to(DEVICE)
    for number, encoded in enumerate(train.encoded(range(9))):
        pixels = crops_of_torchvision(decode(encoded), 16, 1.25, 1).to(DEVICE)
        expected = model.encode(pixels / 127.5 - 1).codes.flatten(1).cpu().numpy()
        codes, labels = store.split("train").read(np.arange(number, 90, 9))[:2]
        assert_same_codes(codes, expected)
        assert (labels == train.labels[number]).all()
    # the validation images are not cropped
    plain = (
        ImageDataset(validation, (16, 16), 1).__getitems__([ImageKey(0, number) for number in range(3)]).images(DEVICE)
    )
    codes, _ = store.split("validation").read(np.arange(3))[:2]
    assert_same_codes(codes, model.encode(plain).codes.flatten(1).cpu().numpy())

    for name in ("manifest.json", "validation-00000.arrow"):
        (store.folder / name).unlink()
    tokenize(config)
    assert "(3 made now, " in capsys.readouterr().out  # existing codes are not counted


@pytest.mark.parametrize(
    ("augmentation", "num_views", "message"),
    [
        ({"max_zoom": 1.1}, 4, r"num_views: received 4; data\.augmentation\.ten_crop makes 10 views"),
        ({"max_zoom": 1.1, "random_crop": True}, 10, r"augmentation\.random_crop: received true; ten_crop"),
        ({"max_zoom": 1.1, "rotate": 5}, 10, r"augmentation\.rotate: received 5\.0; ten_crop"),
        ({}, 10, r"augmentation\.max_zoom: received 1\.0; ten_crop needs more than 1"),
    ],
    ids=str,
)
def test_what_ten_crop_does_not_go_with(tiny_runs, stage2_values, tmp_path, augmentation, num_views, message):
    data = {"dataset": "digits", "augmentation": {"ten_crop": True, **augmentation}}
    values = stage2_values(tmp_path, tiny_runs.vqgan, data=data, num_views=num_views)
    with pytest.raises(ConfigError, match=message):
        load_config(Stage2Config, overrides=values)


def test_stage_1_has_no_views():
    values = {"output_dir": "run", "max_steps": 1, "data.dataset": "digits"}
    with pytest.raises(ConfigError, match=r"ten_crop: received true; it is for the views of a code store"):
        load_config(
            Stage1Config, overrides={**values, "data.augmentation.ten_crop": True, "data.augmentation.max_zoom": 1.1}
        )
