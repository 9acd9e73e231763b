"""Command that encodes and decodes images with a tokenizer, to show what their codes keep.

Usage: `python -m pipelines.reconstruct MODEL --images DIR --grid reconstructions.png`.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import ConfigError, Problem, run
from configs.problems import listed, one_line
from pipelines.commands import ImageOutput, device_of, images_in

if TYPE_CHECKING:
    from PIL import Image

    from stage1_vqgan import VQGANImageProcessor, VQGANModel

MOST_SHOWN = 64  # images in the grid


@dataclass(kw_only=True)
class ReconstructConfig(ImageOutput):
    """Encodes and decodes images, and prints a JSON line for each: its file, and the PSNR of its reconstruction in dB.

    model: folder or Hub id of a tokenizer or of a pipeline
    images: an image, a folder of images, or a list of such
    """

    positional = "model"

    model: str
    images: str | list[str]


def reconstruct(config: ReconstructConfig) -> list[dict[str, Any]]:
    """Reconstructs the images, saves the pictures, and prints the lines.

    A file that cannot be decoded has an `error` in its line in place of `psnr`.

    Returns:
        The lines.

    Raises:
        ConfigError: the model or an image cannot be found, no image can be decoded, or a file exists.
    """
    # These imports are slow, so they come after the check of the arguments.
    from tqdm.auto import tqdm

    from configs.files import write_png
    from stage1_vqgan import reconstruction_grid, spread

    files = image_files([config.images] if isinstance(config.images, str) else config.images)
    paths = config.images_of(list(files))
    vqgan, processor = load_model(config.model, config.device)
    shown = spread(len(files), MOST_SHOWN) if config.grid is not None else []
    originals, reconstructions = [], []
    lines: list[dict[str, Any]] = []
    for number, file in enumerate(tqdm(files.values(), desc="reconstructing", unit="image")):
        try:
            original, reconstruction, psnr = reconstructed(file, vqgan, processor)
        except ValueError as error:
            lines.append({"file": str(file), "error": one_line(error)})
        else:
            lines.append({"file": str(file), "psnr": psnr})
            if paths:
                write_png(paths[number], reconstruction)
            if number in shown:
                originals.append(original)
                reconstructions.append(reconstruction)
        tqdm.write(json.dumps(lines[-1]))
    values = [line["psnr"] for line in lines if "psnr" in line]
    if not values:
        raise ConfigError([Problem("images", f"none of {len(lines)} can be decoded; the first: {lines[0]['error']}")])
    if config.grid is not None and originals:
        write_png(config.grid, reconstruction_grid(originals, reconstructions, columns=8))
    print(f"{len(values)} of {len(lines)} images, mean PSNR {sum(values) / len(values):.2f} dB", file=sys.stderr)
    return lines


def reconstructed(
    file: Path, vqgan: "VQGANModel", processor: "VQGANImageProcessor"
) -> tuple["Image.Image", "Image.Image", float]:
    """An image as the tokenizer gets it, its reconstruction, and the PSNR between them in dB.

    Raises:
        ValueError: the file cannot be decoded.
    """
    import torch

    from stage1_vqgan import EncodedImage, decode
    from stage1_vqgan.reconstruction import peak_signal_to_noise

    pixels = processor(decode(EncodedImage(str(file), str(file))))["pixel_values"].to(vqgan.device)
    with torch.no_grad():
        reconstruction = vqgan(pixels).reconstruction.clamp(-1, 1)
    images = processor.postprocess(torch.cat([pixels, reconstruction]))
    return images[0], images[1], round(peak_signal_to_noise(reconstruction, pixels).item(), 3)


def image_files(given: Sequence[str]) -> dict[str, Path]:
    """The image files that `images` names, and a name for the reconstruction of each.

    The name of a file in a folder is its path in the folder, without its ending: cats/1.jpg becomes cats_1, or
    cats_1_jpg if there is a cats/1.png too.

    Raises:
        ConfigError: a file or folder does not exist, a folder holds no image, or two images would have the same name.
    """
    found = [(name, file) for text in given for name, file in images_in(text)]
    counts = Counter(name for name, _ in found)
    names = [name if counts[name] == 1 else f"{name}{file.suffix.replace('.', '_')}" for name, file in found]
    if repeated := [f"{name}.png" for name, count in Counter(names).items() if count > 1]:
        message = f"several images would be saved as {listed(repeated)}; give them to several commands"
        raise ConfigError([Problem("images", message)])
    return dict(zip(names, (file for _, file in found), strict=True))


def load_model(model: str, device: str | None) -> tuple["VQGANModel", "VQGANImageProcessor"]:
    """The tokenizer of the key `model`, also out of a pipeline, on that of the key `device`; and its image processor.

    Raises:
        ConfigError: neither a tokenizer nor a pipeline can be loaded, or there is no such device.
    """
    from configs.model_folder import local_folder
    from stage1_vqgan import load_image_processor, load_tokenizer

    name = tokenizer_of(model)
    vqgan = load_tokenizer(name, "model")
    try:
        processor = load_image_processor(local_folder(name), vqgan.config)
    except (OSError, ValueError) as error:
        message = f"received {model!r}; its preprocessor_config.json cannot be read: {one_line(error)}"
        raise ConfigError([Problem("model", message)]) from error
    return vqgan.to(device_of(device)), processor  # type: ignore[arg-type]


def tokenizer_of(name: str) -> str:
    """The folder of the tokenizer in a pipeline's folder or repository; the name itself if it is no pipeline."""
    from huggingface_hub import snapshot_download

    from pipelines.hub import INDEX_NAME

    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[INDEX_NAME, "vqgan/*"]))
        except (OSError, ValueError):  # `load_tokenizer` says what is wrong
            return name
    return str(folder / "vqgan") if (folder / INDEX_NAME).is_file() else name


if __name__ == "__main__":
    run(ReconstructConfig, reconstruct, "python -m pipelines.reconstruct")
