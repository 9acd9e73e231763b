"""What a user gives for an image becomes the same prompt as in the code store that the prior learns from."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import VQGANPipeline
from pipelines.conditions import load_conditions
from stage1_vqgan import VQGANImageProcessor, load_vqgan
from stage2_prior import CodeStore
from stage2_prior.condition_images import apply_transform
from stage2_prior.data import CodeDataset
from stage2_prior.prior import build_prior
from stage2_prior.tokenization import tokenize
from tests import conditioned, tiny
from tests.conditioned import ALL, settings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with data, tokenizers and a code store."""
    with conditioned.prepared(tmp_path_factory.mktemp("prompts")) as folder:
        twin = {**ALL["twin"], "tokenizer": str(folder / "own")}
        more = {"twin": twin, "lines": {"transform": "edges"}, "hole": {"transform": "mask 0.5"}}
        tokenize(settings(folder, "run", {**ALL, **more}))
        yield folder


TRANSFORMS = {"gray": "gray", "small": "downscale 2", "hole": "mask 0.5", "lines": "edges"}


@pytest.mark.parametrize("given", ["condition images", "images"])
def test_the_prompts_are_those_of_the_training(root, monkeypatch, given):
    """Condition images are what their transform makes, or the images themselves, which the pipeline transforms."""
    store = CodeStore(root / "run" / "codes")
    layout, split = store.layout, store.split("validation")
    vqgan = load_vqgan(root / "vqgan")
    processor = VQGANImageProcessor.from_pretrained(root / "vqgan")
    torch.manual_seed(0)
    prior = build_prior(tiny.LLAMA, layout)
    pipeline = VQGANPipeline(vqgan, prior, processor, layout, load_conditions(store.folder, layout))

    rows = datasets.Dataset.from_parquet(str(root / "data" / "validation.parquet")).cast_column(
        "image", datasets.Image(decode=False)
    )
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows][:4]  # those with a text
    pixels = processor(images)["pixel_values"]
    made = {
        name: VQGANImageProcessor(num_channels=3).postprocess(apply_transform(transform, pixels))
        for name, transform in TRANSFORMS.items()
    }
    if given == "images":
        made |= {"gray": images, "small": images, "hole": images}
    seen = []
    monkeypatch.setattr(pipeline, "_sampled", lambda prompts, *args, **options: seen.append(prompts) or [prompts])
    pipeline.generate(
        class_labels={"class": ["left", "right"] * 2, "style": [conditioned.STYLES[number % 3] for number in range(4)]},
        text=rows["text"][:4],
        condition_images={**made, "twin": images},
        output_type="codes",
    )
    expected = CodeDataset(split, layout).read(np.arange(4))[2]
    assert seen[0].tolist() == expected.tolist()
    (lines,) = (segment for segment in layout.segments if segment.name == "lines")
    with pytest.raises(ValueError, match=r"^condition_images: images\[3\]: received an image with colours; 'lines'"):
        pipeline._tokenizers["lines"].ids([*made["lines"][:3], images[3]], lines, "condition_images")
