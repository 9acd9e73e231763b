"""Tokenizers with several codes at each position, or with two grids: store, prior, sampling, images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from configs import load_config
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from pipelines.demo.actions import reconstruct
from pipelines.demo.mosaic import mosaic, mosaics
from stage1_vqgan import VQGANConfig, VQGANImageProcessor, VQGANModel
from stage2_prior import CodeStore, Stage2Config
from stage2_prior.tokenization import tokenize
from stage2_prior.training.run import train
from tests import tiny
from tests.devices import DEVICE, assert_same_codes

KINDS = {
    "residual": ({"depth": 2}, ((4, 4, 2),), (4, 4, 2)),
    "pyramid": ({"hidden_channels": 8, "num_res_blocks": 1}, ((2, 2, 1), (4, 4, 1)), (20,)),
}


def write_tokenizer(kind, options, folder):
    """A random tokenizer that uses many codes."""
    torch.manual_seed(0)
    model = VQGANModel(VQGANConfig(**tiny.VQGAN, quantizer=kind, quantizer_options=options))
    images = torch.rand(64, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        for index, codebook in enumerate(model.quantize.codebooks):
            rows = model.quantize.inputs(model.encode(images).latents)[index]
            codebook.place_entries(rows[torch.randperm(len(rows))[: codebook.num_embeddings]])
    model.save_pretrained(folder)
    VQGANImageProcessor(16, 1).save_pretrained(folder)


@pytest.fixture(scope="module", params=[pytest.param("residual", marks=pytest.mark.slow), "pyramid"])
def made(request, tmp_path_factory, stage2_values):
    """Tokenizer, code store, a prior of four steps, and the pipeline that is built and loaded."""
    options, grids, shape = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    write_tokenizer(request.param, options, root / "vqgan")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).resize((16, 16)) for _ in range(40)]
    for number, picture in enumerate(pictures):
        path = root / "images" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    changes = {"data": {"dataset": str(root / "images")}, "num_views": 1, "per_device_train_batch_size": 16}
    changes |= {"max_steps": 4, "num_sample_images": 4}
    config = load_config(Stage2Config, overrides=stage2_values(root, root / "vqgan", **changes))
    tokenize(config)
    train(config)
    paths = {"tokenizer": str(root / "vqgan"), "prior": str(root / "prior"), "output_dir": str(root / "pipeline")}
    build(BuildConfig(**paths))
    pipeline = VQGANPipeline.from_pretrained(root / "pipeline", device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    return SimpleNamespace(root=root, grids=grids, shape=shape, pictures=pictures, pipeline=pipeline)


@torch.no_grad()
def encoded(made):
    pixels = made.pipeline.image_processor(made.pictures)["pixel_values"]
    return made.pipeline.vqgan.encode(pixels.to(DEVICE)).codes


def test_the_store_holds_the_flat_codes(made):
    store = CodeStore(made.root / "codes")
    layout = store.layout
    assert layout.grids == made.grids and layout.codes_shape == made.shape
    assert layout.length == np.prod(made.shape) and layout.pixels == 256 and layout.num_codes == 32
    rows = np.concatenate([store.split(name).read(np.arange(len(store.split(name))))[0] for name in ("train",)])
    expected = encoded(made)
    assert len(expected.unique()) > 16
    flat = {tuple(row) for row in expected.flatten(1).cpu().numpy().tolist()}
    assert rows.shape[1] == layout.length and sum(tuple(row) in flat for row in rows.tolist()) >= 38
    for folder in (made.root / "prior", made.root / "pipeline"):
        file = folder / ("token_layout.json" if folder.name == "prior" else "model_index.json")
        values = json.loads(file.read_text())
        assert values.get("token_layout", values)["grids"] == [list(grid) for grid in made.grids]


@torch.no_grad()
def test_greedy_sampling_equals_that_of_transformers(made):
    pipeline = made.pipeline
    out = pipeline.generate(["a", "b"], num_images_per_label=2, temperature=0.0, output_type="pt")
    assert out.codes.shape == (4, *made.shape) and out.images.shape == (4, 1, 16, 16)
    prior = AutoModelForCausalLM.from_pretrained(made.root / "pipeline" / "prior").to(DEVICE)
    prompt = torch.tensor([[32], [32], [33], [33]], device=DEVICE)
    assert prior.config.max_position_embeddings == prior.generation_config.max_new_tokens == np.prod(made.shape)
    codes = prior.generate(prompt, do_sample=False)[:, 1:]
    assert torch.equal(codes.view(-1, *made.shape), out.codes)
    pixels = (pipeline.vqgan.decode_codes(out.codes).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(pixels, out.images.to(DEVICE), atol=1e-5, rtol=0)
    card = (made.root / "pipeline" / "README.md").read_text()
    assert f".view(4, {', '.join(map(str, made.shape))})" in card and pipeline.layout.codes_text in card


def test_an_image_depends_on_its_seed_alone(made):
    options = {"guidance_scale": 1.5, "output_type": "codes"}
    together = made.pipeline.generate(["a"] * 5, seed=3, batch_size=2, **options).codes
    alone = made.pipeline.generate("a", seed=7, **options).codes
    assert torch.equal(alone[0], together[4]) and not torch.equal(together[0], together[4])


def test_images_are_encoded_and_decoded(made):
    pipeline = made.pipeline
    codes = pipeline.encode(made.pictures)
    assert_same_codes(codes.cpu().numpy(), encoded(made).cpu().numpy())
    decoded = pipeline.decode(codes.tolist(), "np")
    np.testing.assert_array_equal(decoded, pipeline.reconstruct(made.pictures, "np"))
    with pytest.raises(ValueError, match="codes: received"):
        pipeline.decode(codes[..., :1])
    if codes.ndim == 2:
        with pytest.raises(ValueError, match=r"codes: received torch.int64 \(40, 19\); needs int64 \(B, 20\)"):
            pipeline.decode(codes[:, :-1])


def test_another_layout_is_refused(made):
    from dataclasses import replace

    parts = made.pipeline.components
    with pytest.raises(ValueError, match=r"token_layout.grids: received \(\(4, 4, 1\),\), but the tokenizer has"):
        VQGANPipeline(**{**parts, "layout": replace(parts["layout"], grids=())})


def test_the_demo_shows_every_grid(made):
    codes = encoded(made)[0].cpu().numpy()
    picture = np.asarray(mosaics(codes, made.grids, side=80, gap=4))
    if made.shape == (20,):
        parts = [codes[:4].reshape(2, 2), codes[4:].reshape(4, 4)]
    else:
        parts = [codes[..., depth] for depth in range(2)]
    assert picture.shape == (80, 164, 3)
    for number, part in enumerate(parts):
        assert np.array_equal(picture[:, 84 * number : 84 * number + 80], np.asarray(mosaic(part, 80)))
    path = next((made.root / "images" / "a").iterdir())
    shown = reconstruct(made.pipeline, path.read_bytes())
    assert made.pipeline.layout.codes_text in shown.facts and shown.mosaic.width > shown.mosaic.height
