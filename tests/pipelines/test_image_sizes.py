"""Both stages and the pipeline with images that are no squares, and with a size of stage 2's own."""

import json
from dataclasses import replace

import pytest

from configs import ConfigError, load_config
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.evaluate import EvaluationConfig, evaluate
from stage1_vqgan import Stage1Config
from stage1_vqgan.training.run import train as train_stage1
from stage2_prior import CodeStore, Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training.run import train as train_stage2
from tests import tiny
from tests.image_files import write_folder
from tests.slow import few


@pytest.fixture(scope="module")
def trained(tmp_path_factory, stage2_values):
    """A tokenizer for images 32 high and 64 wide, and the settings of a prior."""
    root = tmp_path_factory.mktemp("sizes")
    pictures = {f"{kind}/{n}.png": 20 * n + kind for kind in (0, 1) for n in range(12)}
    data = {"dataset": write_folder(root / "images", pictures), "validation_fraction": 0.25}
    values = {
        "output_dir": str(root / "vqgan"),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "report_to": [],
        "data": data,
        "model": {**tiny.VQGAN, "in_channels": 3, "image_size": [32, 64]},
        "loss": {"perceptual_weight": 0, "adversarial_weight": 0},
        "codebook": {"kmeans_init_batches": 1},
    }
    train_stage1(load_config(Stage1Config, overrides=values))
    changes = {"data": data, "max_steps": 2, "num_views": 1, "num_sample_images": 2, "per_device_train_batch_size": 8}
    return root, load_config(Stage2Config, overrides=stage2_values(root, root / "vqgan", **changes))


@pytest.mark.parametrize(
    ("image_size", "shape"),
    few([(None, (32, 64)), (16, (16, 16)), ([64, 32], (64, 32))], ([64, 32], (64, 32))),
    ids=["same", "square", "upright"],
)
def test_images_of_any_size_go_through_all_steps(trained, image_size, shape, tmp_path):
    root, config = trained
    folders = {"code_store": str(tmp_path / "codes"), "output_dir": str(tmp_path / "prior")}
    config = replace(config, image_size=image_size, **folders)
    grid = shape[0] // 4, shape[1] // 4
    assert tokenize(config).layout.grid == grid
    train_stage2(config)
    parts = {"tokenizer": str(root / "vqgan"), "prior": config.output_dir, "output_dir": str(tmp_path / "pipeline")}
    build(BuildConfig(**parts))
    pipeline = VQGANPipeline.from_pretrained(tmp_path / "pipeline")
    out = pipeline.generate(["0", "1"], seed=0)
    assert out.codes.shape == (2, *grid) and [image.size for image in out.images] == [shape[::-1]] * 2
    assert pipeline.encode(out.images).shape == (2, *grid)
    folder = {"pipeline": str(tmp_path / "pipeline"), "output_dir": str(tmp_path / "evaluation")}
    sizes = {"samples_per_class": 4, "num_components": 2, "grid_columns": 2, "metrics": {"feature_networks": []}}
    metrics = evaluate(load_config(EvaluationConfig, overrides={**folder, **sizes, "data": vars(config.data)}))
    assert metrics["num_samples"] == 8
    height, width = shape
    assert f"{height}×{width}" in (tmp_path / "pipeline" / "README.md").read_text()
    stored = json.loads((tmp_path / "pipeline" / "vqgan" / "config.json").read_text())
    assert stored["fingerprint"] == json.loads((root / "vqgan" / "config.json").read_text())["fingerprint"]


def test_codes_of_another_size_are_refused(trained, tmp_path):
    config = replace(trained[1], image_size=16, code_store=str(tmp_path / "codes"), output_dir=str(tmp_path / "prior"))
    tokenize(config)
    assert CodeStore(tmp_path / "codes").layout.grid == (4, 4)
    other = replace(config, image_size=None)
    with pytest.raises(ConfigError, match=r"code_store: .* with image_size \[16, 16\], but .* now \[32, 64\]"):
        tokenize(other)
    with pytest.raises(ConfigError, match=r"image_size: .* was written with \[16, 16\]"):
        train_stage2(other)


@pytest.mark.parametrize("size", [18, [16, 30], [16], 0])
def test_sizes_that_no_tokenizer_takes(trained, size, tmp_path):
    values = {"code_store": str(tmp_path / "codes"), "image_size": size}
    with pytest.raises(ConfigError, match=r"image_size: received"):
        tokenize(replace(trained[1], **values))
