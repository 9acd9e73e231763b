"""What the commands generate, reconstruct and score share: where their images go, and how a pipeline is loaded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs import ConfigError, Problem, Section
from configs.problems import listed, one_line
from configs.sections import NonNegativeFloat, Positive

if TYPE_CHECKING:
    import torch

    from pipelines.pipeline_vqgan import VQGANPipeline


@dataclass(kw_only=True)
class ImageOutput(Section):
    """Where the images of a command go.

    output_dir: folder for the images, a PNG file for each
    grid: PNG file that shows all images together, with labels
    overwrite: replace files that exist; otherwise the command refuses to start
    device: where to compute, such as "cpu" or "cuda"; null takes the GPU if there is one
    """

    output_dir: str | None = None
    grid: str | None = None
    overwrite: bool = False
    device: str | None = None

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        if self.grid is not None and not self.grid.lower().endswith(".png"):
            yield "grid", self.grid, "must be the name of a PNG file, such as samples.png"

    def images_of(self, names: list[str]) -> list[Path]:
        """The paths in `output_dir` of images with these names; creates the folders of all images, and checks them.

        Raises:
            ConfigError: a file exists, unless `overwrite`.
        """
        paths = [] if self.output_dir is None else [Path(self.output_dir, f"{name}.png") for name in names]
        self.require_new("output_dir", paths)
        self.require_new("grid", [] if self.grid is None else [Path(self.grid)])
        for path in (*paths[:1], *([] if self.grid is None else [Path(self.grid)])):
            path.parent.mkdir(parents=True, exist_ok=True)
        return paths

    def require_new(self, key: str, paths: list[Path]) -> None:
        """Refuses to replace files that the key `key` names, unless `overwrite`.

        Raises:
            ConfigError: a file exists.
        """
        found = [path.name for path in paths if path.exists()]
        if found and not self.overwrite:
            message = f"received {getattr(self, key)!r}, which would replace {listed(found)}"
            raise ConfigError([Problem(key, f"{message}; choose another name, or add --overwrite true")])


@dataclass(kw_only=True)
class UnmaskingSettings(Section):
    """How a masked prior samples; a causal prior refuses these keys. A default of the pipeline precedes those below.

    num_steps: predictions for an image, 12 by default
    order: "confidence" first chooses the codes of which the prior is surest (default), "halton" chooses codes far from
        each other
    order_temperature: weight of the random part of the order "confidence", 4.5 by default
    """

    num_steps: Positive | None = None
    order: Literal["confidence", "halton"] | None = None
    order_temperature: NonNegativeFloat | None = None

    @property
    def unmasking(self) -> dict[str, Any]:
        """The keys that are set, as arguments of `VQGANPipeline.generate`."""
        values = {field.name: getattr(self, field.name) for field in fields(UnmaskingSettings)}
        return {name: value for name, value in values.items() if value is not None}


def images_in(text: str, key: str = "images") -> Iterator[tuple[str, Path]]:
    """The image files that a key names, a file or all images in a folder, and a name for each.

    Raises:
        ConfigError: there is no such file, or the folder holds no images.
    """
    from stage1_vqgan.data.decoding import readable_extensions

    path = Path(text).expanduser()
    if path.is_file():
        yield path.stem, path
        return
    extensions = readable_extensions()
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in extensions and file.is_file()]
    if not files:
        reason = "this folder holds no images" if path.is_dir() else "there is no such file or folder"
        raise ConfigError([Problem(key, f"received {text!r}; {reason}")])
    for file in files:
        yield "_".join(file.relative_to(path).with_suffix("").parts), file


def device_of(name: str | None) -> "torch.device":
    """The device that the key `device` names; for null the GPU if the machine has one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    from pipelines.arguments import require_device

    try:
        named = require_device(name, None)
    except ValueError as error:
        raise ConfigError([Problem.of_error(error)]) from error
    return named or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(name: str, device: str | None = None) -> "VQGANPipeline":
    """Loads the pipeline that the key `pipeline` names, on the device of the key `device`.

    Raises:
        ConfigError: it cannot be loaded, or there is no such device.
    """
    from safetensors import SafetensorError

    from pipelines.pipeline_vqgan import VQGANPipeline

    there = device_of(device)
    try:
        return VQGANPipeline.from_pretrained(name, device=there)
    except (OSError, ValueError, SafetensorError) as error:
        where = "" if Path(name).is_dir() else "there is no such folder, and it cannot be loaded from the Hub: "
        raise ConfigError([Problem("pipeline", f"received {name!r}; {where}{one_line(error, 180)}")]) from error
