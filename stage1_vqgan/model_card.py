"""The card of a tokenizer that is uploaded alone, and the files that its upload holds."""

from math import prod
from pathlib import Path
from typing import Any

from configs.card import (
    card_metadata,
    install_block,
    license_part,
    measured,
    part,
    picture,
    read_facts,
    table,
    training_part,
    with_front_matter,
    write_card,
)
from configs.card_facts import collect_run, dataset_ids, run_license
from configs.loss_curves import Panel
from configs.model_folder import weights_files
from configs.uploads import copy_run
from configs.weights_files import read_headers
from stage1_vqgan.configuration_vqgan import VQGANConfig
from stage1_vqgan.quantizer_grids import grids_text

PANELS = [
    Panel("L1 error of the pixels", {"loss/l1": "training", "eval/reconstruction_l1": "validation"}),
    Panel("PSNR (dB)", {"eval/psnr": "validation"}),
]
PICTURES = {"reconstructions": "reconstructions.png"}
TASK = "image-feature-extraction"
IN_INDEX = ("psnr", "ssim", "reconstruction_l1")


def export_tokenizer(source: Path, target: Path, name: str, license: str | None = None) -> None:
    """Writes what is uploaded of a run of stage 1: the model, settings, results, and the card with its facts.

    Raises:
        Damaged: a file of the model has changed since it was saved.
    """
    copy_run(source, target)
    collect_run(source, target, "tokenizer", PANELS, PICTURES)
    write_card(target, lambda license: tokenizer_card(target, name, license), license or run_license(source))


def tokenizer_card(folder: Path, name: str, license: str) -> str:
    """A new card for the tokenizer in a folder.

    Args:
        folder: holds the model and the facts of its run.
        name: folder or Hub id in the examples.
        license: an identifier of the Hub.
    """
    config = VQGANConfig.from_pretrained(folder)
    run = read_facts(folder).get("runs", {}).get("tokenizer", {})
    metrics = {key: run["results"][key] for key in IN_INDEX if key in run.get("results", {})}
    ids = dataset_ids(folder)
    others: dict[str, Any] = {"pipeline_tag": TASK}
    if metrics:
        results = measured(TASK, run.get("data") or "unknown", ids[0] if ids else None, metrics)
        others |= {"model_name": name.split("/")[-1], "eval_results": results}
    metadata = card_metadata(license, ids, ["vqgan", "image-tokenizer"], **others)
    shown = picture(folder, PICTURES["reconstructions"], "Images and reconstructions", CAPTION)
    body = [
        "# Image tokenizer",
        part("pictures", shown),
        part("use", summary(config), *use_blocks(name)),
        part("details", "## Details", table(detail_rows(config, folder))),
        training_part(folder),
        license_part(license),
        f"## Limits\n\n{LIMITS}",
    ]
    return with_front_matter(metadata, "\n" + "\n\n".join(body) + "\n")


CAPTION = "Held-out images above, their reconstructions below."
LIMITS = (
    "The tokenizer knows images like those that it was trained on. It loses detail, and shows other images less "
    "faithfully. It has not been examined for any use in which an error could harm somebody."
)
WITHOUT_PACKAGE = """```bash
pip install torch torchvision transformers einops
```"""


def summary(config: VQGANConfig) -> str:
    """One sentence: what the tokenizer does."""
    (height, width), grids = config.image_shape, config.grids
    grid = f"a grid of {grids_text(grids)}" if len(grids) == 1 else f"grids of {grids_text(grids)}"
    codes = f"{config.num_codes_per_image} codes, {grid}, out of {config.num_embeddings:,}"
    return f"Turns an image of {height}×{width} pixels into {codes}. It turns codes back into an image."


def use_blocks(name: str) -> list[str]:
    """Examples with and without this package."""
    return [
        "## Use",
        install_block(),
        f"""```python
from stage1_vqgan import VQGANImageProcessor, VQGANModel

vqgan = VQGANModel.from_pretrained("{name}").eval()
processor = VQGANImageProcessor.from_pretrained("{name}")
codes = vqgan.encode(processor(image, return_tensors="pt").pixel_values).codes  # image: a PIL image
images = processor.postprocess(vqgan.decode_codes(codes))
```""",
        "Without this package. `trust_remote_code=True` runs the Python files of this repository, so read them first:",
        WITHOUT_PACKAGE,
        f"""```python
from transformers import AutoImageProcessor, AutoModel

vqgan = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)
codes = vqgan.encode(processor(image, return_tensors="pt").pixel_values).codes
images = processor.postprocess(vqgan.decode_codes(codes))
```""",
    ]


def detail_rows(config: VQGANConfig, folder: Path) -> list[tuple[str, str]]:
    """Rows for a table of facts. `folder` holds the tokenizer's weights."""
    factor, channels = config.downsampling_factor, config.in_channels
    last = "in the last grid " if len(config.grids) > 1 else ""
    return [
        ("Code grid", f"{grids_text(config.grids)} codes, {last}one for {factor}×{factor} pixels"),
        ("Codebook", f"{config.num_embeddings:,} entries of width {config.embed_dim}, quantizer `{config.quantizer}`"),
        ("Channels", {1: "1 (gray)", 3: "3 (colour)"}.get(channels, str(channels))),
        ("Tokenizer", f"{num_parameters(folder):,} parameters, fingerprint `{config.fingerprint}`"),
    ]


def num_parameters(folder: Path) -> int:
    """The number of weights in the safetensors files of a folder."""
    return sum(prod(stored.shape) for stored in read_headers(weights_files(folder)).values())
