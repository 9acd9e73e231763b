"""Saves, loads and pushes a pipeline's folder.

model_index.json        class, versions, token layout, tokenizer fingerprint
README.md               model card
*.py                    the tokenizer's model files, for AutoModel with trust_remote_code
vqgan/                  config.json, model.safetensors, preprocessor_config.json
prior/                  config.json, model.safetensors, generation_config.json
janus/                  on request: config.json, model.safetensors of the tokenizer as a JanusVQVAE of transformers
"""

import inspect
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from configs.arguments import described
from configs.checksums import CHECKSUMS_NAME, verify_checksums
from configs.files import read_json, write_json
from configs.hub import is_repo_id
from configs.staging import finish_interrupted, replaced_files
from configs.uploads import check_upload
from pipelines.model_card import model_card
from stage1_vqgan import VQGANImageProcessor, VQGANModel, load_image_processor, load_vqgan
from stage2_prior import TokenLayout, load_causal_lm, without_adapters

INDEX_NAME, JANUS = "model_index.json", "janus"

# Files of an earlier upload that must not mix with those of a new one.
STALE = ("vqgan/*.safetensors*", "prior/*.safetensors*", f"{JANUS}/*")


def save(
    folder: str | Path,
    vqgan: VQGANModel,
    prior: PreTrainedModel,
    image_processor: VQGANImageProcessor,
    layout: TokenLayout,
    name: str = "path/or/repository",
    janus: bool = False,
    **options: Any,
) -> None:
    """Writes a pipeline's folder. Adapters of the prior are merged into the saved copy.

    Args:
        folder: created if it does not exist.
        vqgan, prior, image_processor, layout: components of the pipeline.
        name: folder or Hub id in the example of the model card.
        janus: also write `janus/`. A folder that has one gets a new one in any case.
        **options: passed to the models' `save_pretrained`, for instance `max_shard_size`.
    """
    prior = without_adapters(prior)
    index = {
        "_class_name": "VQGANPipeline",
        "versions": versions(),
        "token_layout": layout.to_dict(),
        "tokenizer_fingerprint": layout.tokenizer_fingerprint,
    }
    needed = vqgan.get_memory_footprint() + prior.get_memory_footprint()
    with replaced_files(folder, needed) as staged:
        vqgan.save_pretrained(staged / "vqgan", **options)
        image_processor.save_pretrained(staged / "vqgan")
        prior.save_pretrained(staged / "prior", **options)
        if janus or (Path(folder) / JANUS / "config.json").is_file():
            from stage1_vqgan.convert.janus import write  # slow to import

            write(vqgan, staged / JANUS, "janus")
        for source in tokenizer_sources():
            shutil.copy(source, staged)
        write_json(staged / INDEX_NAME, index)
        (staged / "README.md").write_text(model_card(vqgan, prior, layout, name))


def push(
    repo_id: str,
    components: dict[str, Any],
    private: bool | None,
    commit_message: str,
    janus: bool = False,
    **options: Any,
) -> str:
    """Uploads a pipeline's folder to the Hugging Face Hub; see `VQGANPipeline.push_to_hub`."""
    api = HfApi(token=options.pop("token", None))
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    options = {"commit_message": commit_message, "delete_patterns": list(STALE), **options}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "pipeline"
        save(folder, **components, name=repo_id, janus=janus)
        check_upload(folder, api.token)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def find(name: str | Path, subfolder: str = "", **download: Any) -> Path:
    """The folder of a pipeline; downloads it if the name is a Hub id.

    Args:
        name: folder, or repository on the Hugging Face Hub.
        subfolder: path of the pipeline inside the folder or repository.
        **download: revision, token, cache_dir and local_files_only, as in `huggingface_hub.snapshot_download`.

    Raises:
        FileNotFoundError: the folder holds no pipeline.
        ValueError: the subfolder lies outside the folder.
    """
    inside = PurePosixPath(subfolder)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"subfolder: received {subfolder!r}; must be a path inside the folder or repository")
    folder = Path(name)
    if not folder.is_dir():
        if not is_repo_id(str(name)):
            raise FileNotFoundError(f"there is no folder {str(name)!r}, and the name is not a valid Hub id")
        names = (INDEX_NAME, CHECKSUMS_NAME, f"{JANUS}/{CHECKSUMS_NAME}", "vqgan/*", "prior/*")
        wanted = [str(inside / name) for name in names]
        folder = Path(snapshot_download(str(name), allow_patterns=wanted, **download))
    folder /= inside
    finish_interrupted(folder)
    if not (folder / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: {INDEX_NAME} is missing")
    return folder


def load(
    folder: Path,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Loads the components of a pipeline, as arguments of its constructor; see `VQGANPipeline.from_pretrained`.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: a file does not fit the others, or refers to code or files outside the folder.
    """
    index = read_json(folder / INDEX_NAME)
    if "token_layout" not in index:
        kind = index.get("_class_name", "no class")
        raise ValueError(
            f"{folder / INDEX_NAME}: received an index of {kind} without token_layout; VQGANPipeline needs it"
        )
    try:
        layout = TokenLayout.from_dict(index["token_layout"])
    except ValueError as error:
        raise ValueError(f"{folder / INDEX_NAME}: {error}") from error
    verify_checksums(folder)
    dtype = torch.float32 if dtype is None else dtype
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    vqgan = load_vqgan(folder / "vqgan", dtype=dtype)
    return {
        "vqgan": vqgan,
        "prior": load_causal_lm(folder / "prior", trust_remote_code, dtype=dtype, **attention),
        "image_processor": load_image_processor(folder / "vqgan", vqgan.config),
        "layout": layout,
    }


def one_device(
    device: torch.device | str | None, device_map: str | int | torch.device | dict[str, Any] | None
) -> torch.device | None:
    """The device that `device` or `device_map` names; None if neither is given.

    Raises:
        ValueError: both are given, or the map spreads a model over several devices.
    """
    if device_map is None:
        return None if device is None else torch.device(device)
    if device is not None:
        raise ValueError(
            f"device_map: received {described(device_map)} and device={described(device)}; pass only one of them"
        )
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    named = device_map.values() if isinstance(device_map, dict) else [device_map]
    try:
        (only,) = {torch.device(name) for name in named}
    except (RuntimeError, TypeError, ValueError) as error:
        allowed = "'auto', a device, or a dictionary with one device, because both models must be on the same device"
        raise ValueError(f"device_map: received {described(device_map)}; allowed are {allowed}") from error
    return only


def tokenizer_sources() -> list[Path]:
    """The tokenizer's model files. The folder carries them so that `AutoModel` loads it without this package."""
    entries = [inspect.getfile(kind) for kind in (VQGANModel, VQGANImageProcessor)]
    imported = [file for entry in entries for file in get_relative_import_files(entry)]
    return sorted({Path(file) for file in entries + imported})


def versions() -> dict[str, str]:
    """Versions of this package, torch and transformers."""
    try:
        own = version("tessella")
    except PackageNotFoundError:  # a clone that is not installed
        own = "unknown"
    return {"tessella": own, "torch": torch.__version__, "transformers": transformers.__version__}
