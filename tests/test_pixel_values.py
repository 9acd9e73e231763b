"""Hounsfield units and RGBA images on their way through both stages: one range, and all channels, everywhere."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from configs import ConfigError, load_config
from pipelines import VQGANPipeline
from stage1_vqgan import Stage1Config, VQGANImageProcessor, load_images, load_tokenizer
from stage1_vqgan.evaluate import ReconstructionConfig, evaluate
from stage1_vqgan.evaluation.config import MetricsConfig
from stage1_vqgan.training.run import train as train_stage1
from stage2_prior import CodeStore, Stage2Config
from stage2_prior.tokenize import tokenize
from tests import tiny


def write(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.{'tif' if image.mode == 'F' else 'png'}")
    return folder


def stage1(root, data, **changes):
    settings = {
        "output_dir": str(root / "vqgan"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "num_sample_images": 2,
        "model": tiny.VQGAN,
        "data": data,
        "loss": {"perceptual_weight": 0, "adversarial_start_step": 0},
        "discriminator": {"base_channels": 8, "num_layers": 1},
        "codebook": {"kmeans_init_batches": 1},
    }
    return load_config(Stage1Config, overrides={**settings, **changes})


def test_hounsfield_units_keep_their_range(tmp_path, stage2_values, random_prior, capsys):
    rng = np.random.default_rng(0)
    slices = [rng.uniform(-1000, 400, (16, 16)).astype(np.float32) for _ in range(20)]
    slices[7][0, 0], slices[8][0, 0] = -1024, 3071
    data = {"dataset": str(write(tmp_path / "ct", [Image.fromarray(one) for one in slices]))}
    with pytest.raises(ConfigError, match=r"value_range: received null, but 19 images hold float32 from -1024 to 3071"):
        train_stage1(stage1(tmp_path, data))
    config = stage1(tmp_path, {**data, "value_range": "auto"})
    train_stage1(config)
    assert "data.value_range auto: 19 images hold float32 from -1024 to 3071" in capsys.readouterr().out
    measured = json.loads((tmp_path / "vqgan" / "value_range.json").read_text())
    assert measured == {"value_range": [-1024, 3071], "value_range_of_bytes": False}
    processor = VQGANImageProcessor.from_pretrained(tmp_path / "vqgan")
    assert processor.value_range == [-1024, 3071] and not processor.value_range_of_bytes
    expected = (torch.from_numpy(slices[3]) + 1024) / 4095 * 2 - 1
    for image in (slices[3], torch.from_numpy(slices[3]), Image.fromarray(slices[3])):
        assert (processor(image)["pixel_values"][0, 0] - expected).abs().max() <= 1 / 255 + 1e-6

    overrides = stage2_values(tmp_path, tmp_path / "vqgan", data=data, num_views=1, max_steps=1)
    stage2 = load_config(Stage2Config, overrides=overrides)
    with pytest.raises(ConfigError, match=r"received \[0.0, 1.0\], but .* was trained with \[-1024.0, 3071.0\]"):
        tokenize(replace(stage2, data=replace(stage2.data, value_range=[0.0, 1.0])))
    tokenize(stage2)
    tokenize(replace(stage2, data=replace(stage2.data, value_range="auto")))  # the same range, so the store is complete
    store = CodeStore(tmp_path / "codes")
    prior, vqgan = random_prior("llama", store.layout), load_tokenizer(str(tmp_path / "vqgan"))
    VQGANPipeline(vqgan, prior, processor, store.layout).save_pretrained(tmp_path / "pipeline")
    pipeline = VQGANPipeline.from_pretrained(tmp_path / "pipeline")
    stored, _ = store.split("validation").read(np.array([0]))[:2]
    validation = load_images(stage2.data)[1]
    original = Image.open(validation.encoded([0])[0].content)
    codes = pipeline.encode([original, np.asarray(original)])
    assert codes[0].flatten().tolist() == codes[1].flatten().tolist() == stored[0].tolist()
    in_units = pipeline.image_processor.to_values(pipeline.reconstruct(original, output_type="np"))
    assert in_units.min() >= -1024 and in_units.max() <= 3071 and np.ptp(in_units) > 10
    assert pipeline.reconstruct(original)[0].mode == "L"
    without = MetricsConfig(perceptual_networks=[], feature_networks=[])
    metrics = evaluate(ReconstructionConfig(model=str(tmp_path / "vqgan"), data=stage2.data, metrics=without))
    assert metrics["images"] == 1 and "skipped" not in metrics


def test_alpha_is_a_channel(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 4), dtype=np.uint8)
    data = {"dataset": str(write(tmp_path / "rgba", [Image.fromarray(one) for one in pixels]))}
    loss = {"lpips_backbone": "squeeze", "lpips_weights": "random", "adversarial_start_step": 0}
    model = train_stage1(stage1(tmp_path, data, model={**tiny.VQGAN, "image_size": 32, "in_channels": 4}, loss=loss))
    said = capsys.readouterr().out
    assert "LPIPS compares the first three channels of 4" in said and "lpips/squeeze-random 0." in said
    processor = VQGANImageProcessor.from_pretrained(tmp_path / "vqgan")
    values = processor(Image.fromarray(pixels[0]))["pixel_values"]
    assert torch.equal(((values[0] + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(pixels[0]))
    with torch.no_grad():
        (image,) = processor.postprocess(model(values).reconstruction)
    assert image.mode == "RGBA" and len(np.unique(np.asarray(image)[..., 3])) > 1
    (grid,) = (tmp_path / "vqgan" / "reconstructions").iterdir()
    assert Image.open(grid).mode == "RGB"
