"""CLIP guidance with a tiny random CLIP: what it reaches, that it repeats, and what it refuses."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from configs import run
from pipelines import CLIPGuidance, VQGANPipeline
from pipelines.clip.encoder import CLIPEncoder
from pipelines.clip.latents import LatentSpace, latent_range
from pipelines.clip.objective import Objective
from pipelines.clip_guidance import CLIPGuidanceConfig, clip_guidance
from stage1_vqgan import VQGANImageProcessor, codes_shape
from stage2_prior import TokenLayout
from tests.clip_models import SPECIAL, TEXT, VISION, make_vqgan, save_clip, seeded, widen
from tests.devices import DEVICE, cpu_only
from tests.slow import few
from tests.stage1_vqgan.test_quantizer_kinds import KINDS

FEW = {"num_cutouts": 4, "progress_bar": False}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def guide(clip) -> CLIPGuidance:
    return CLIPGuidance(make_vqgan(), clip)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def similarity(clip: Path, images: list, text: str) -> torch.Tensor:
    """Of whole images and a text, by transformers alone."""
    inputs = dict(CLIPImageProcessor.from_pretrained(clip)(images, return_tensors="pt"))
    inputs |= AutoTokenizer.from_pretrained(clip)(text, return_tensors="pt")
    with torch.no_grad():
        out = CLIPModel.from_pretrained(clip)(**inputs)
    return out.image_embeds @ out.text_embeds[0]


def same(one, other) -> bool:
    return torch.equal(one.codes, other.codes) and all(map(np.array_equal, one.images, other.images))


def test_the_similarity_rises(guide, clip):
    out = guide("dog", steps=20, num_images=3, seed=10, learning_rate=0.3, **FEW)
    assert out.similarities.shape == (20, 3, 1) and [image.size for image in out.images] == [(16, 16)] * 3
    assert out.similarities[-5:].mean() > out.similarities[:5].mean() + 0.02
    first = guide("dog", steps=1, num_images=3, seed=10, learning_rate=1e-9, **FEW)
    assert similarity(clip, out.images, "dog").mean() > similarity(clip, first.images, "dog").mean() + 0.01


def test_latents_stay_in_the_range_of_the_codebook(guide):
    start, target = guide.space.random([0], (4, 4)), guide.clip.to(DEVICE).embed_prompt("dog")[None]
    objective = Objective(guide.space, guide.clip, target, start.new_ones(1), start, 0.0, [0], 2)
    codebook = guide.vqgan.quantize.codebook.detach()
    low, high = codebook.amin(0)[:, None, None], codebook.amax(0)[:, None, None]
    for latents, _ in islice(objective.descent(learning_rate=0.5, ema_decay=0.0), 4):
        assert (low <= latents).all() and (latents <= high).all() and not torch.equal(latents, start)


def test_embeddings_are_those_of_transformers(guide, clip):
    with torch.no_grad():
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy())
    encoder = CLIPEncoder(clip).to(DEVICE)
    expected = similarity(clip, [image], "dog").item()
    text, whole = encoder.embed_prompt("dog"), encoder.embed_prompt(image)
    (part,) = encoder.embed(torch.from_numpy(np.asarray(image) / np.float32(255)).permute(2, 0, 1)[None].to(DEVICE))
    assert (text @ whole).item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


@cpu_only
def test_a_seed_gives_the_same_image_in_any_batch(guide):
    torch.manual_seed(1)
    pair = guide("a cat", steps=4, num_images=2, seed=5, **FEW)
    torch.manual_seed(2)
    assert same(guide("a cat", steps=4, num_images=2, seed=5, **FEW), pair) and pair.seeds == [5, 6]
    alone = guide("a cat", steps=4, seed=6, **FEW)
    assert torch.equal(alone.codes[0], pair.codes[1]) and not torch.equal(alone.codes[0], pair.codes[0])
    torch.testing.assert_close(alone.similarities[:, 0], pair.similarities[:, 1])


def test_several_prompts_with_weights(guide):
    """An image moves towards one colour, and away from the other."""
    red, blue = (Image.new("RGB", (32, 32), name) for name in ("red", "blue"))
    options = {"steps": 12, "seed": 0, "learning_rate": 0.3, **FEW}
    one = guide([red, (blue, -0.5)], **options).similarities
    other = guide([(red, -1), blue], **options).similarities
    to_red, to_blue = (one[-5:] - other[-5:]).mean(0)[0]
    assert one.shape == (12, 1, 2) and to_red - to_blue > 0.03


def test_the_gradient_is_that_of_the_formula(clip):
    """Adam takes no scale of the gradient, so the weights are compared in the gradient itself."""
    vqgan = make_vqgan()
    vqgan.decoder.conv_out.weight.data *= 0.1  # all pixels lie inside of the clamp, which is not linear
    guide = CLIPGuidance(vqgan, clip)
    latents = guide.space.random([0], (4, 4))
    targets = torch.stack([guide.clip.to(DEVICE).embed_prompt(prompt) for prompt in ("a cat", picture())])

    def gradient(*weights, pull=0.0):
        weights, start = latents.new_tensor(weights), torch.zeros_like(latents)
        return Objective(guide.space, guide.clip, targets, weights, start, pull, [0], 4).gradient(latents, 0)[0]

    torch.testing.assert_close(gradient(2, -0.5), 2 * gradient(1, 0) - 0.5 * gradient(0, 1), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient(0, 0, pull=3.0), 3 * latents / latents.numel())
    assert all(parameter.grad is None for parameter in vqgan.parameters())


ONES = [kind for kind in KINDS if kind != "pyramid"]


@pytest.mark.parametrize("kind", few(ONES, "vq, unit sphere", "simvq", "gumbel", "fsq", "lfq", "residual", "product"))
def test_every_kind_of_quantizer(kind, clip):
    name, count, width, options = KINDS[kind]
    guide = CLIPGuidance(
        make_vqgan(quantizer=name, num_embeddings=count, embed_dim=width, quantizer_options=options), clip
    )
    start = guide.space.random([0], (4, 4))
    codes = guide.space.quantized(start)[1]
    out = guide("a cat", steps=2, seed=0, learning_rate=1.0, output_type="pt", **FEW)
    assert out.codes.shape == codes.shape == (1, *codes_shape(guide.vqgan.quantize.grids(4, 4)))
    assert not torch.equal(out.codes, codes)  # a gradient has reached the latents
    with torch.no_grad():
        images = guide.vqgan.decode_codes(out.codes)
    torch.testing.assert_close(out.images, (images.clamp(-1, 1) + 1) / 2)


@pytest.mark.parametrize("kind", ["vq", "lfq", "bsq", "residual", "product", "fsq"])
def test_the_range_is_that_of_all_entries(kind):
    name, count, width, options = KINDS[kind]
    quantizer = make_vqgan(quantizer=name, num_embeddings=count, embed_dim=width, quantizer_options=options).quantize
    low, high = latent_range(quantizer, DEVICE)
    if kind == "fsq":  # latents in the range reach all levels
        _, codes, _ = quantizer.quantize(torch.stack([low, high]))
        assert codes.tolist() == [0, count - 1]
        return
    depth = options.get("depth", options.get("groups"))
    codes = torch.cartesian_prod(*[torch.arange(count)] * depth) if depth else torch.arange(count)
    entries = quantizer.entries(codes.to(DEVICE))
    torch.testing.assert_close(low, entries.amin(0))
    torch.testing.assert_close(high, entries.amax(0))


def test_gumbel_gives_codes_the_nearest_entries():
    space = LatentSpace(make_vqgan(quantizer="gumbel", num_embeddings=16))
    codes = torch.randint(16, (2, 4, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    entries = space.vqgan.lookup(codes).detach().requires_grad_()
    quantized, found = space.quantized(entries + 1e-3)
    assert torch.equal(found, codes) and torch.allclose(quantized, entries, atol=1e-6)
    quantized.sum().backward()
    assert torch.equal(entries.grad, torch.ones_like(entries))


def test_a_start_image_and_the_pull_to_it(guide):
    options = {"init": picture(), "steps": 5, "seed": 0, "size": (16, 24), "learning_rate": 0.02, **FEW}
    processor = VQGANImageProcessor((16, 24), 3)
    pixels = processor(picture())["pixel_values"].to(DEVICE)
    with torch.no_grad():
        codes = guide.vqgan.encode(pixels).codes
    close, free = guide("a cat", init_weight=1e6, **options), guide("a cat", **options)
    changed = [(out.codes != codes).float().mean() for out in (close, free)]
    assert close.codes.shape == (1, 4, 6) and close.images[0].size == (24, 16)
    assert changed[0] <= changed[1] and changed[0] < 0.2


def test_the_average_of_the_latents(guide):
    """With a decay near 1, all latents count alike."""
    options = {"steps": 6, "seed": 0, "learning_rate": 0.3, **FEW}
    last, average = guide("a cat", **options), guide("a cat", ema_decay=0.999, **options)
    assert torch.equal(last.similarities, average.similarities)  # it does not change what is optimised
    assert not torch.equal(last.codes, average.codes)


def test_progress_is_reported(guide):
    seen = []
    options = {"steps": 5, "seed": 0, "callback_steps": 2, **FEW}
    out = guide("a cat", callback=lambda *progress: seen.append(progress), **options)
    assert [step for step, _, _ in seen] == [2, 4, 5]
    assert np.array_equal(seen[-1][1][0], out.images[0])
    assert torch.equal(torch.stack([each for *_, each in seen]), out.similarities[[1, 3, 4]])


def test_a_pipeline_of_gray_images(clip, random_prior):
    vqgan = make_vqgan(in_channels=1)
    vqgan.config.fingerprint = vqgan.compute_fingerprint()
    layout = TokenLayout(32, (), (4, 4), 4, vqgan.config.fingerprint)
    pipeline = VQGANPipeline(vqgan, random_prior("gpt2", layout), VQGANImageProcessor(16, 1), layout)
    options = {"steps": 2, "seed": 0, **FEW}
    out = CLIPGuidance(pipeline, clip)("a cat", **options)
    assert out.images[0].mode == "L" and np.array_equal(pipeline.decode(out.codes)[0], out.images[0])
    assert same(CLIPGuidance(vqgan, str(clip))("a cat", **options), out)


def test_siglip(clip, tmp_path):
    with seeded():
        model = SiglipModel(SiglipConfig(text_config={**TEXT, **SPECIAL}, vision_config=VISION)).eval()
        widen(model, 0.1)
    model.save_pretrained(tmp_path)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.save_pretrained(tmp_path)
    guide = CLIPGuidance(make_vqgan(), tmp_path)
    red = Image.new("RGB", (32, 32), "red")
    out = guide(red, steps=10, seed=0, learning_rate=0.3, **FEW)
    assert out.similarities[-4:].mean() > out.similarities[:4].mean() + 0.1
    tokens = tokenizer("cat", padding="max_length", max_length=12, return_tensors="pt")  # as it is trained
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(**tokens).pooler_output[0], dim=-1)
    torch.testing.assert_close(guide.clip.embed_prompt("cat").cpu(), expected, atol=1e-5, rtol=1e-4)


WRONG = {
    "no prompt": ({"prompts": []}, "prompts: received an empty list; needs at least one text or image"),
    "number": ({"prompts": ["a", 3]}, r"prompts\[1\]: received 3; must be a text, a PIL image"),
    "weight": ({"prompts": ("a", 0)}, r"prompts\[0\]: received 0; allowed is a weight"),
    "long text": ({"prompts": "abcdefghijklm"}, "prompts: received 'abcdefghijklm'; it has 15 tokens, and .* takes 12"),
    "no colours": ({"prompts": Image.new("F", (8, 8), 300)}, "prompts: .*value_range"),
    "steps": ({"steps": 0}, "steps: received 0"),
    "size": ({"size": 18}, "size: received 18; needs a side in pixels or .height, width., divisible by 4"),
    "sides": ({"size": (16, 16, 16)}, "size: received"),
    "pull": ({"init_weight": 0.1}, "init_weight: received 0.1; it needs an image to pull to, so give init too"),
    "start": ({"init": "cat.png"}, "init: received 'cat.png'; .*PIL"),
    "rate": ({"learning_rate": 0}, "learning_rate: received 0; allowed is a number above 0"),
    "decay": ({"ema_decay": 1}, "ema_decay: received 1; allowed is a number from 0 to below 1"),
    "cut-outs": ({"num_cutouts": 0}, "num_cutouts: received 0"),
    "memory": ({"num_cutouts": 10**12}, "num_cutouts: received .*; needs at least .* of memory, but"),
    "seed": ({"seed": -1}, "seed: received -1"),
    "output": ({"output_type": "codes"}, "output_type: received 'codes'; allowed are 'pil', 'np', 'pt'"),
    "callback": ({"callback": 3}, "callback: received 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused(case, guide):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        guide(**{"prompts": "a", "steps": 1, **FEW, **arguments})


def test_models_that_cannot_be_guided_are_refused(clip, tmp_path):
    for vqgan, message in [
        (make_vqgan(in_channels=4), "model: received a tokenizer of 4 channels; CLIP sees gray or RGB"),
        (make_vqgan(quantizer="pyramid"), "model: received a tokenizer with quantizer 'pyramid'; networks lie between"),
        ("runs/vqgan", "model: received 'runs/vqgan'; must be a VQGANPipeline or a VQGANModel"),
    ]:
        with pytest.raises(ValueError, match=message):
            CLIPGuidance(vqgan, clip)
    make_vqgan().save_pretrained(tmp_path / "vqgan")
    CLIPModel.from_pretrained(clip).vision_model.save_pretrained(tmp_path / "vision")
    CLIPImageProcessor().save_pretrained(tmp_path / "vision")
    for name, message in [
        (tmp_path / "nowhere", "clip: received .*; there is no such folder"),
        (tmp_path / "vqgan", "clip: received .*vqgan'; it must hold a CLIP or SigLIP of transformers"),
        (tmp_path / "vision", "a CLIPVisionModel does not embed images and texts"),
        (3, "clip: received 3; must be a folder or a Hub id"),
    ]:
        with pytest.raises(ValueError, match=message):
            CLIPGuidance(make_vqgan(), name)


@pytest.fixture
def command(clip, tmp_path, monkeypatch, capsys):
    """Runs the command beside a tokenizer and a picture; returns its line, or what it says when it refuses."""
    monkeypatch.chdir(tmp_path)
    make_vqgan().save_pretrained("vqgan")
    VQGANImageProcessor(16, 3).save_pretrained("vqgan")
    picture().save("picture.png")

    def start(*arguments):
        fixed = ["vqgan", f"--clip={clip}", "--steps=3", "--num_cutouts=4", "--seed=5", f"--device={DEVICE}"]
        try:
            run(CLIPGuidanceConfig, clip_guidance, "command", [*fixed, *arguments])
        except SystemExit as exited:
            assert exited.code == 2
            return capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return start


def test_the_command_writes_the_image_and_a_line(command, guide):
    prompts = ["--text=[a cat, dog]", "--text_weights=[1, -0.5]", "--image=picture.png", "--image_weights=2"]
    line = command(*prompts, "--init=picture.png", "--size=[16, 24]", "--output=out/a.png", "--save_steps=2")
    asked = ["a cat", ("dog", -0.5), (picture(), 2)]
    out = guide(asked, init=picture(), size=(16, 24), steps=3, seed=5, **FEW)
    assert np.array_equal(Image.open("out/a.png"), out.images[0])
    assert [prompt.get("text", prompt.get("image")) for prompt in line["prompts"]] == ["a cat", "dog", "picture.png"]
    assert [prompt["weight"] for prompt in line["prompts"]] == [1, -0.5, 2]
    assert (line["file"], line["seed"], line["steps"]) == ("out/a.png", 5, 3)
    assert [prompt["similarity"] for prompt in line["prompts"]] == pytest.approx(
        out.similarities[-1, 0].tolist(), abs=1e-4
    )


MISTAKES = {
    "nothing": (["--output=a.png"], "text: give a text, or --image with the file of an image"),
    "weights": (
        ["--output=a.png", "--text=a", "--text_weights=[1, 2]"],
        "text_weights: received [1.0, 2.0]; needs a number",
    ),
    "no PNG": (["--output=a.jpg", "--text=a"], "output: received 'a.jpg'; must be the name of a PNG file"),
    "no image": (["--output=a.png", "--image=b.png"], "image: received 'b.png'; "),
    "long text": (["--output=a.png", "--text=abcdefghijklm"], "prompts: received 'abcdefghijklm'; it has 15 tokens"),
    "size": (["--output=a.png", "--text=a", "--size=18"], "size: received 18; needs a side in pixels"),
    "exists": (["--output=picture.png", "--text=a"], "output: received 'picture.png', which exists; choose another"),
    "no CLIP": (["--output=a.png", "--text=a", "--clip=vqgan"], "clip: received 'vqgan'; it must hold a CLIP"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_of_the_command_are_messages(case, command):
    arguments, message = MISTAKES[case]
    assert message in command(*arguments)
    assert not Path("a.png").exists()
