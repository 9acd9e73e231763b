"""The pipeline: generation, the files of its folder, and arguments that it refuses."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from configs import ConfigError
from configs.randomness import draw_seeds
from pipelines import VQGANPipeline
from pipelines.build import BuildConfig, build
from stage1_vqgan import VQGANImageProcessor, VQGANModel
from stage2_prior import TokenLayout
from tests.devices import DEVICE
from tests.model_folders import without_checksums

ROOT = Path(__file__).resolve().parents[2]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in load_digits().images[:9]]


@pytest.fixture(scope="module")
def unrelated_layout() -> TokenLayout:
    return TokenLayout(32, tuple("0123456789"), (4, 4), 4, "another tokenizer")


# ---------------------------------------------------------------------- generation


def test_equal_seeds_make_equal_images(tiny_pipeline):
    first, again, other = (
        tiny_pipeline.generate([3, 7], num_images_per_label=4, generator=seeded(seed), output_type="np")
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.codes, again.codes) and np.array_equal(first.images, again.images)
    assert not torch.equal(first.codes, other.codes)


def test_an_image_does_not_depend_on_the_others(tiny_pipeline):
    labels = [n % 10 for n in range(64)]
    options = {"guidance_scale": 2.0, "top_p": 0.95, "output_type": "codes"}
    together = tiny_pipeline.generate(labels, generator=[seeded(n) for n in range(64)], **options).codes
    in_batches = tiny_pipeline.generate(labels, generator=[seeded(n) for n in range(64)], batch_size=7, **options).codes
    assert torch.equal(in_batches, together)
    for n in (0, 13, 63):
        assert torch.equal(tiny_pipeline.generate(labels[n], generator=seeded(n), **options).codes[0], together[n])


def test_one_generator_makes_the_first_images_again(tiny_pipeline):
    many, few = (
        tiny_pipeline.generate([5], num_images_per_label=count, generator=seeded(), output_type="codes").codes
        for count in (6, 2)
    )
    assert len(many.unique(dim=0)) > 1 and torch.equal(many[:2], few)


def test_an_image_is_made_again_alone_from_its_label_and_seed(tiny_pipeline):
    options = {"guidance_scale": 2.0, "top_p": 0.95, "output_type": "codes"}
    for source in ({"seed": 5}, {"generator": seeded()}, {"seed": [3, 2**63 - 1, 3, 0, 8, 8]}, {}):
        out = tiny_pipeline.generate([3, "7"], num_images_per_label=3, **source, **options)
        assert len(out) == 6 and out.labels == ["3", "3", "3", "7", "7", "7"]
        for n in (0, 1, 4):
            alone = tiny_pipeline.generate(out.labels[n], seed=out.seeds[n], **options)
            assert torch.equal(alone.codes[0], out.codes[n]) and alone.seeds == [out.seeds[n]]
        assert torch.equal(tiny_pipeline.generate(out.labels, seed=out.seeds, **options).codes, out.codes)


def test_one_seed_counts_up_and_a_generator_draws(tiny_pipeline):
    """So the seed 0 and a generator with the seed 0 make different images."""
    counted = tiny_pipeline.generate(num_images=4, seed=2, output_type="codes")
    drawn = tiny_pipeline.generate(num_images=4, generator=seeded(2), output_type="codes")
    assert counted.seeds == [2, 3, 4, 5] and counted.labels is None
    assert drawn.seeds == draw_seeds(4, seeded(2)).tolist() != counted.seeds
    assert len(torch.cat([counted.codes, drawn.codes]).unique(dim=0)) == 8
    later = tiny_pipeline.generate(num_images=2, seed=4, output_type="codes").codes
    assert torch.equal(later, counted.codes[2:])


def test_a_pipeline_and_its_output_describe_themselves(tiny_pipeline):
    parameters = sum(weight.numel() for weight in tiny_pipeline.prior.parameters())
    text = repr(tiny_pipeline)
    for fact in ("16×16 pixels, 1 channel, 4×4 codes", "classes: 10 (0, 1", f"LlamaForCausalLM, {parameters:,} param"):
        assert fact in text
    assert f"device: {tiny_pipeline.device}, float32" in text and len(text.splitlines()) == 7
    out = tiny_pipeline.generate([3, 7], num_images_per_label=4, seed=0)
    for fact in ("8 PIL images, L, 16×16", "torch.int64 (8, 4, 4)", "3 (4), 7 (4)", "seeds: 0, 1, 2, 3 and 4 more"):
        assert fact in repr(out)
    assert (len(out), out[0] is out.images, out[1] is out.codes) == (8, True, True)
    free = tiny_pipeline.generate(num_images=2, output_type="np", seed=0)
    assert "labels" not in repr(free) and "float32 (2, 16, 16, 1)" in repr(free) and len(free) == 2
    again = pickle.loads(pickle.dumps(out))
    assert (len(again), again.labels, again.seeds) == (8, out.labels, out.seeds)


@pytest.mark.parametrize(
    "labels",
    [[4, 9, 0], ["4", "9", "0"], ("4", 9, np.int64(0)), torch.tensor([4, 9, 0]), np.array([4, 9, 0])],
    ids=repr,
)
def test_labels_are_names_or_ids(tiny_pipeline, labels):
    expected = tiny_pipeline.generate([4, 9, 0], generator=seeded(), output_type="codes").codes
    assert torch.equal(tiny_pipeline.generate(labels, generator=seeded(), output_type="codes").codes, expected)


@pytest.mark.parametrize("label", [4, "4", np.int64(4), torch.tensor(4), [4]], ids=repr)
def test_a_single_label_needs_no_list(tiny_pipeline, label):
    codes = tiny_pipeline.generate(label, num_images_per_label=2, generator=seeded(), output_type="codes").codes
    assert torch.equal(codes, tiny_pipeline.generate([4, 4], generator=seeded(), output_type="codes").codes)


def test_images_of_one_label_follow_one_another(tiny_pipeline):
    grouped = tiny_pipeline.generate([8, 1], num_images_per_label=3, generator=seeded(), output_type="codes").codes
    spelled_out = tiny_pipeline.generate([8, 8, 8, 1, 1, 1], generator=seeded(), output_type="codes").codes
    assert torch.equal(grouped, spelled_out)


def test_the_label_matters(tiny_pipeline):
    greedy = tiny_pipeline.generate(list(range(10)), temperature=0.0, output_type="codes").codes
    assert len(greedy.unique(dim=0)) > 1


def test_without_labels(tiny_pipeline):
    out = tiny_pipeline.generate(num_images=3, generator=seeded(), output_type="codes")
    assert out.codes.shape == (3, 4, 4) and out.images is None
    assert torch.equal(tiny_pipeline.generate(generator=seeded(), output_type="codes").codes, out.codes[:1])


def test_output_types_show_the_same_images(tiny_pipeline):
    outs = {
        name: tiny_pipeline.generate([1, 2, 3], generator=seeded(), output_type=name)
        for name in ("pil", "np", "pt", "codes")
    }
    assert all(torch.equal(out.codes, outs["pil"].codes) for out in outs.values())
    pil, np_, pt = (outs[name].images for name in ("pil", "np", "pt"))
    assert outs["codes"].images is None
    assert outs["codes"].codes.dtype == torch.int64 and outs["codes"].codes.shape == (3, 4, 4)
    assert pt.shape == (3, 1, 16, 16) and pt.dtype == torch.float32 and pt.min() >= 0 and pt.max() <= 1
    assert np_.shape == (3, 16, 16, 1) and np.array_equal(np_, pt.permute(0, 2, 3, 1).cpu().numpy())
    for image, array in zip(pil, np_, strict=True):
        assert (image.mode, image.size) == ("L", (16, 16))
        assert np.array_equal(np.asarray(image), np.round(array[..., 0] * 255))


def test_guidance(tiny_pipeline):
    off, default, zero, free, strong = (
        tiny_pipeline.generate(labels, generator=seeded(), output_type="codes", **options).codes
        for labels, options in [
            ([2] * 4, {"guidance_scale": 1.0}),
            ([2] * 4, {}),
            ([2] * 4, {"guidance_scale": 0.0}),  # scale 0 ignores the class
            (None, {"num_images": 4}),
            ([2] * 4, {"guidance_scale": 8.0}),
        ]
    )
    assert torch.equal(off, default) and torch.equal(zero, free)
    assert not torch.equal(off, strong)


def test_call_is_generate(tiny_pipeline):
    assert torch.equal(
        tiny_pipeline([6], generator=seeded()).codes, tiny_pipeline.generate([6], generator=seeded()).codes
    )


def test_callback_sees_every_position(tiny_pipeline):
    steps = []
    codes = tiny_pipeline.generate(
        [1, 2, 3],
        batch_size=2,
        output_type="codes",
        callback_on_step_end=lambda position, chosen: steps.append((position, chosen.clone())),
    ).codes.flatten(1)
    assert [position for position, _ in steps] == [*range(16), *range(16)]
    assert torch.equal(torch.stack([chosen for _, chosen in steps[:16]], 1), codes[:2])
    assert torch.equal(torch.stack([chosen for _, chosen in steps[16:]], 1), codes[2:])


def test_progress_bar_can_be_hidden_and_named(tiny_runs, capfd):
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline)
    capfd.readouterr()
    pipeline.generate([1])
    assert "sampling" in capfd.readouterr().err
    pipeline.set_progress_bar_config(desc="painting")
    pipeline.generate([1])
    assert "painting" in capfd.readouterr().err
    pipeline.set_progress_bar_config(disable=True)
    pipeline.generate([1])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": []}, "class_labels: received an empty list"),
        ({"class_labels": [10]}, "class_labels: received 10; allowed are ids 0 to 9 or names: 0, 1"),
        ({"class_labels": "ten"}, "class_labels: received 'ten'"),
        ({"class_labels": [1.5]}, "class_labels: received 1.5"),
        ({"class_labels": True}, "class_labels: received True"),
        ({"class_labels": [1], "temperature": float("nan")}, "temperature: received nan"),
        ({"class_labels": [1], "temperature": -1}, "temperature: received -1"),
        ({"class_labels": [1], "top_p": 0}, "top_p: received 0"),
        ({"guidance_scale": 2.0}, "guidance_scale: received 2.0; guidance needs class_labels"),
        ({"class_labels": [1], "num_images": 2}, "num_images: received 2; cannot be given with class_labels"),
        ({"num_images": 0}, "num_images: received 0"),
        ({"num_images_per_label": 2}, "num_images_per_label: "),
        ({"class_labels": [1], "num_images_per_label": 0}, "num_images_per_label: received 0"),
        ({"class_labels": [1], "output_type": "pill"}, "output_type: received 'pill'; allowed are 'pil', 'np'"),
        ({"class_labels": [1], "batch_size": 0}, "batch_size: received 0"),
        pytest.param(
            {"class_labels": [1, 2], "generator": [seeded()]}, "generator: received a list of 1 for 2 images", id="one"
        ),
    ],
    ids=str,
)
def test_arguments_that_cannot_work(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.generate(**arguments)


# ---------------------------------------------------------------------- images in


def test_reconstruct_is_encode_and_decode(tiny_pipeline, images):
    codes = tiny_pipeline.encode(images)
    assert codes.shape == (9, 4, 4) and codes.dtype == torch.int64
    for one, other in zip(tiny_pipeline.reconstruct(images), tiny_pipeline.decode(codes), strict=True):
        assert one.tobytes() == other.tobytes()
    pixels = VQGANImageProcessor(size=16, num_channels=1)(images)["pixel_values"].to(DEVICE)
    with torch.no_grad():
        expected = (tiny_pipeline.vqgan(pixels).reconstruction.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(tiny_pipeline.reconstruct(images, "pt"), expected)


def test_an_image_may_be_pil_array_or_tensor(tiny_pipeline, images):
    codes = tiny_pipeline.encode(images)
    arrays = [np.asarray(image) for image in images]
    for kind in (arrays, [torch.from_numpy(array.copy())[None] for array in arrays], np.stack(arrays)[..., None]):
        assert torch.equal(tiny_pipeline.encode(kind), codes)
    assert torch.equal(tiny_pipeline.encode(images[2]), codes[2:3])


def test_generated_images_are_their_decoded_codes(tiny_pipeline):
    out = tiny_pipeline.generate([1, 2, 3, 4, 5], batch_size=2, generator=seeded(), output_type="pt")
    torch.testing.assert_close(tiny_pipeline.decode(out.codes, "pt"), out.images)


# ---------------------------------------------------------------------- the folder


def test_saved_and_loaded_it_generates_the_same(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "copy")
    loaded = VQGANPipeline.from_pretrained(str(tmp_path / "copy"), device=DEVICE)
    first, second = (
        pipeline.generate([1, 5], guidance_scale=2.0, generator=seeded(), output_type="pt")
        for pipeline in (tiny_pipeline, loaded)
    )
    assert torch.equal(first.codes, second.codes) and torch.equal(first.images, second.images)
    assert loaded.class_names == tiny_pipeline.class_names == [str(digit) for digit in range(10)]


def test_what_the_folder_holds(tiny_runs):
    found = {str(path.relative_to(tiny_runs.pipeline)) for path in tiny_runs.pipeline.rglob("*") if path.is_file()}
    sources = {"configuration_vqgan.py", "modeling_vqgan.py", "image_processing_vqgan.py", "quantizers.py"}
    sources.add("image_processing_shapes.py")
    sources |= {path.name for path in (ROOT / "stage1_vqgan").glob("quantizer_*.py")}
    assert found >= {"model_index.json", "README.md", *sources}
    assert found >= {"vqgan/config.json", "vqgan/model.safetensors", "vqgan/preprocessor_config.json"}
    assert found >= {"prior/config.json", "prior/model.safetensors", "prior/generation_config.json"}
    index = json.loads((tiny_runs.pipeline / "model_index.json").read_text())
    assert index["_class_name"] == "VQGANPipeline"
    assert index["versions"]["torch"] == torch.__version__
    assert TokenLayout.from_dict(index["token_layout"]) == TokenLayout.from_pretrained(tiny_runs.prior)
    assert index["tokenizer_fingerprint"] == VQGANModel.from_pretrained(tiny_runs.vqgan).compute_fingerprint()


def test_the_card_states_facts(tiny_runs, tiny_pipeline):
    text = (tiny_runs.pipeline / "README.md").read_text()
    _, front_matter, body = text.split("---\n", 2)
    header = yaml.safe_load(front_matter)
    assert header["library_name"] == "tessella" and "vqgan" in header["tags"]
    fingerprint = tiny_pipeline.layout.tokenizer_fingerprint
    parameters = {
        name: sum(weight.numel() for weight in getattr(tiny_pipeline, name).parameters()) for name in ("vqgan", "prior")
    }
    for fact in (
        "16×16 gray images",
        "16 codes out of 32",
        "(`llama`)",
        "| Code grid | 4×4 codes, one for 4×4 pixels |",
        "| Codebook | 32 entries of width 4, quantizer `vq` |",
        f"| Tokenizer | {parameters['vqgan']:,} parameters, fingerprint `{fingerprint}` |",
        f"| Prior | {parameters['prior']:,} parameters |",
        "class c is token 32 + c; no class is token 42",
        *(f"| {digit} | {digit} | {count} |" for digit, count in enumerate(tiny_pipeline.layout.class_counts)),
    ):
        assert fact in body.replace("\n", " ") or fact in body


def test_the_code_of_the_card_runs(tiny_runs, tmp_path, monkeypatch):
    (tmp_path / "path" / "or").mkdir(parents=True)
    (tmp_path / "path" / "or" / "repository").symlink_to(tiny_runs.pipeline)
    monkeypatch.chdir(tmp_path)
    blocks = (tiny_runs.pipeline / "README.md").read_text().split("```python\n")[1:]
    names: dict = {}
    for block in blocks:
        exec(block.split("```")[0], names)
    assert len(names["images"]) == 4 and names["prior"].config.vocab_size == 64


def test_bfloat16(tiny_runs, images):
    pipeline = VQGANPipeline.from_pretrained(tiny_runs.pipeline, dtype=torch.bfloat16, device=DEVICE)
    assert pipeline.dtype == pipeline.vqgan.dtype == torch.bfloat16
    first, again = (pipeline.generate([1], guidance_scale=2.0, generator=seeded(), output_type="np") for _ in range(2))
    assert first.images.dtype == np.float32 and np.array_equal(first.images, again.images)
    assert first.codes.max() < 32
    assert len(pipeline.reconstruct(images)) == 9
    assert pipeline.to(torch.float32).dtype == torch.float32


@pytest.mark.slow
def test_fingerprint_survives_a_cast(tiny_runs, tmp_path):
    VQGANPipeline.from_pretrained(tiny_runs.pipeline, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert VQGANPipeline.from_pretrained(tmp_path).generate([1]).codes.shape == (1, 4, 4)


def test_components_make_the_pipeline_again(tiny_pipeline):
    again = VQGANPipeline(**tiny_pipeline.components)
    first, second = (pipe.generate([4], generator=seeded()).codes for pipe in (tiny_pipeline, again))
    assert torch.equal(first, second)


def test_parts_that_do_not_belong_together_are_refused(
    tiny_pipeline, tiny_runs, unrelated_layout, random_prior, tmp_path
):
    parts = tiny_pipeline.components
    with pytest.raises(ValueError, match=r"tokenizer: received .* codes are of another tokenizer"):
        VQGANPipeline(**{**parts, "layout": unrelated_layout})
    larger = TokenLayout(64, (), (4, 4), 4, parts["layout"].tokenizer_fingerprint)
    with pytest.raises(ValueError, match="prior: received a vocabulary of 128 tokens; the layout has 64"):
        VQGANPipeline(**{**parts, "prior": random_prior("llama", larger)})
    prior = tmp_path / "prior"
    shutil.copytree(tiny_runs.prior, prior, ignore=shutil.ignore_patterns("checkpoint-*"))
    unrelated_layout.save_pretrained(without_checksums(prior))
    config = BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=str(prior), output_dir=str(tmp_path / "pipeline"))
    with pytest.raises(ConfigError, match="codes are of another tokenizer"):
        build(config)
    assert not (tmp_path / "pipeline").exists()


def test_an_exchanged_tokenizer_is_refused(tiny_runs, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_runs.pipeline, folder)
    other = VQGANModel(VQGANModel.from_pretrained(folder / "vqgan").config)
    other.config.fingerprint = None
    other.save_pretrained(folder / "vqgan")
    with pytest.raises(ValueError, match=rf"vqgan/checksums\.json: this file is missing .*remove {folder}/checksums"):
        VQGANPipeline.from_pretrained(folder)
    (folder / "checksums.json").unlink()
    with pytest.raises(ValueError, match="tokenizer: received"):
        VQGANPipeline.from_pretrained(folder)


def test_folders_without_a_pipeline(tiny_runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is missing"):
        VQGANPipeline.from_pretrained(tiny_runs.vqgan)
    for missing in (tmp_path / "nowhere", "./nowhere", "runs/no/pipeline"):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            VQGANPipeline.from_pretrained(missing)
    with pytest.raises(ConfigError, match=r"prior: received .*stage2_prior\.train"):
        build(BuildConfig(tokenizer=str(tiny_runs.vqgan), prior=str(tmp_path), output_dir=str(tmp_path / "out")))
