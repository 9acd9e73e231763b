"""Saves, loads and pushes a pipeline's folder.

model_index.json        class, versions, token layout, tokenizer fingerprint, sampling defaults if there are any
config.json             names the class; the Hub counts the downloads of a repository by this file
README.md               model card
card/                   what the card shows, if it is known: pictures, metrics, settings and facts of the training
*.py                    the tokenizer's model files, for AutoModel with trust_remote_code
vqgan/                  config.json, model.safetensors, preprocessor_config.json
prior/                  config.json, model.safetensors, generation_config.json
conditions/<name>/      of texts: tokenizer.json; of condition images: the files of vqgan/
janus/                  on request: config.json, model.safetensors of the tokenizer as a JanusVQVAE of transformers
"""

import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from configs.arguments import described
from configs.card import CARD_NAME, FACTS_FOLDER, write_card
from configs.checksums import CHECKSUMS_NAME, checksum, verify_checksums
from configs.files import make_folder, read_json, remove_tree, write_json
from configs.hub import is_repo_id, push_folder
from configs.staging import finish_interrupted, replaced_files
from configs.uploads import MODEL_FILES, copy_files
from configs.versions import own_version
from pipelines.conditions import FOLDER, ConditionTokenizer, ImageTokenizer, load_conditions, save_conditions
from pipelines.model_card import PLACEHOLDER, model_card
from stage1_vqgan import VQGANImageProcessor, VQGANModel, load_image_processor, load_vqgan
from stage2_prior import TokenLayout, load_language_model, without_adapters
from stage2_prior.condition_text import TOKENIZER_NAME

INDEX_NAME, JANUS, DEFAULTS = "model_index.json", "janus", "sampling_defaults"

# The file by which the Hub counts downloads. No library knows the model_type, so nothing loads the folder as one model.
CONFIG = {"model_type": "tessella_pipeline", "architectures": ["VQGANPipeline"]}

# What an author may have put into the folder of a pipeline that is not yet built.
ALLOWED = {CARD_NAME, "LICENSE", "LICENSE.txt", "LICENSE.md"}

# What an upload of a saved pipeline holds, by its folders.
UPLOADED = {
    "": (INDEX_NAME, *ALLOWED, *MODEL_FILES),
    "vqgan": MODEL_FILES,
    "prior": MODEL_FILES,
    JANUS: MODEL_FILES,
    FACTS_FOLDER: ("*.png", "*.json", "*.yaml"),
}

# The same for the folder of a condition.
CONDITION_FILES = (TOKENIZER_NAME, *MODEL_FILES)

# Files of an earlier upload that must not mix with those of a new one.
STALE = ("vqgan/*.safetensors*", "prior/*.safetensors*", f"{FOLDER}/*", f"{JANUS}/*", "card/*")


def save(
    folder: str | Path,
    vqgan: VQGANModel,
    prior: PreTrainedModel,
    image_processor: VQGANImageProcessor,
    layout: TokenLayout,
    conditions: Mapping[str, ConditionTokenizer] | None = None,
    sampling_defaults: Mapping[str, Any] | None = None,
    *,
    name: str = PLACEHOLDER,
    janus: bool = False,
    origin: Path | None = None,
    add_facts: Callable[[Path], None] | None = None,
    license: str | None = None,
    **options: Any,
) -> None:
    """Writes a pipeline's folder. Adapters of the prior are merged into the saved copy.

    What the author has written in an older README.md stays, see `configs.card`. Facts of a card stay with the weights
    that they are about.

    Args:
        folder: created if it does not exist.
        vqgan, prior, image_processor, layout, conditions: components of the pipeline.
        sampling_defaults: those of the pipeline; None keeps those in the folder if the weights are still the same.
        name: folder or Hub id in the examples of the model card.
        janus: also write `janus/`. A folder that has one gets a new one in any case.
        origin: the folder that the pipeline was loaded from, whose card is copied if the weights are still the same.
        add_facts: writes what is known about the training into the folder that it is given; see `configs.card_facts`.
        license: an identifier of the Hub, for the card.
        **options: passed to the models' `save_pretrained`, for instance `max_shard_size`.

    Raises:
        ValueError: the folder holds something else than a pipeline.
    """
    folder = Path(folder)
    require_place(folder)
    prior = without_adapters(prior)
    index: dict[str, Any] = {
        "_class_name": "VQGANPipeline",
        "versions": versions(),
        "token_layout": layout.to_dict(),
        "tokenizer_fingerprint": layout.tokenizer_fingerprint,
    }
    others = [one.vqgan for one in (conditions or {}).values() if isinstance(one, ImageTokenizer)]
    needed = sum(model.get_memory_footprint() for model in (vqgan, prior, *others))
    with replaced_files(folder, needed) as staged:
        vqgan.save_pretrained(staged / "vqgan", **options)
        image_processor.save_pretrained(staged / "vqgan")
        prior.save_pretrained(staged / "prior", **options)
        save_conditions(staged, conditions or {}, **options)
        if janus or (Path(folder) / JANUS / "config.json").is_file():
            from stage1_vqgan.convert.janus import write  # slow to import

            write(vqgan, staged / JANUS, "janus")
        for source in tokenizer_sources():
            shutil.copy(source, staged)
        if sampling_defaults is None and same_weights(folder, staged):
            sampling_defaults = read_json(folder / INDEX_NAME).get(DEFAULTS)
        write_json(staged / INDEX_NAME, index_with(index, sampling_defaults or {}))
        write_json(staged / "config.json", CONFIG)
        _keep_card(staged, folder, origin)
        if add_facts is not None:
            add_facts(staged)
        write_card(staged, lambda license: model_card(staged, name, license), license)
        remove_tree(folder / FACTS_FOLDER)  # the facts of other weights
    for place in (folder / FOLDER).glob("*"):
        if place.name not in (conditions or {}):
            remove_tree(place)  # of another prior


def index_with(index: Mapping[str, Any], sampling_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of model_index.json with these sampling defaults in place of others."""
    others = {key: value for key, value in index.items() if key != DEFAULTS}
    return others | ({DEFAULTS: dict(sampling_defaults)} if sampling_defaults else {})


def save_defaults(folder: Path, sampling_defaults: Mapping[str, Any]) -> None:
    """Replaces the sampling defaults of a saved pipeline, at once with its checksums. Its models stay as they are.

    Raises:
        Damaged: a file has changed since it was saved.
    """
    verify_checksums(folder)
    index, path = read_json(folder / INDEX_NAME), folder / CHECKSUMS_NAME
    with replaced_files(folder) as staged:
        for name in read_json(path) if path.is_file() else ():  # what the new checksums list again
            make_folder((staged / name).parent)
            shutil.copyfile(folder / name, staged / name)
        write_json(staged / INDEX_NAME, index_with(index, sampling_defaults))


def _keep_card(staged: Path, folder: Path, origin: Path | None) -> None:
    """Copies into a staged pipeline the facts of a card of the same weights, and the card that the author wrote."""
    known = [place for place in (folder, origin) if place is not None and same_weights(place, staged)]
    for place in known[:1]:
        if (place / FACTS_FOLDER).is_dir():
            shutil.copytree(place / FACTS_FOLDER, staged / FACTS_FOLDER)
    for place in [folder, *known]:
        if (place / CARD_NAME).is_file():
            shutil.copyfile(place / CARD_NAME, staged / CARD_NAME)
            return


def same_weights(one: Path, other: Path) -> bool:
    """Whether two pipeline folders hold the same files of weights."""
    return bool(weights_of(one)) and weights_of(one) == weights_of(other)


def weights_of(folder: Path) -> dict[str, str]:
    """The checksum of each file of weights in a pipeline's folder; empty if it is none."""
    files = [path for part in ("vqgan", "prior") for path in (folder / part).glob("*.safetensors")]
    return {path.relative_to(folder).as_posix(): checksum(path) for path in files}


def require_place(folder: Path) -> None:
    """Refuses a folder that holds something else than a pipeline. A README.md and a LICENSE may be there.

    Raises:
        ValueError: names what the folder holds.
    """
    finish_interrupted(folder)
    if (folder / INDEX_NAME).is_file():
        found = read_json(folder / INDEX_NAME).get("_class_name")
        if found == "VQGANPipeline":
            return
        raise ValueError(f"{folder} holds a {described(found)} of another library; choose another folder")
    if others := [name for name in _names(folder) if name not in ALLOWED]:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(f"{folder} holds {others[0]}{more}, but no pipeline; choose an empty or a new folder")


def _names(folder: Path) -> list[str]:
    """What a folder holds, without hidden files."""
    return sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))


def push(
    repo_id: str,
    components: dict[str, Any],
    private: bool | None,
    janus: bool = False,
    origin: Path | None = None,
    **options: Any,
) -> str:
    """Uploads a pipeline's folder to the Hugging Face Hub; see `VQGANPipeline.push_to_hub`."""
    license = options.pop("license", None)

    def write(folder: Path, name: str) -> None:
        save(folder, **components, name=name, janus=janus, origin=origin, license=license)

    return push_folder(repo_id, write, STALE, private, **options)


def push_saved(repo_id: str, source: Path, private: bool | None, license: str | None = None, **options: Any) -> str:
    """Uploads the folder of a saved pipeline as it is, with its card; only the examples name the repository.

    Raises:
        Damaged: a file of the models has changed since it was saved.
        ValueError: a file is a symbolic link, or holds a secret or the path of your home folder.
    """
    conditions = {f"{FOLDER}/{place.name}": CONDITION_FILES for place in (source / FOLDER).glob("*")}
    for parent in ("", "vqgan", "prior", *conditions, JANUS):
        verify_checksums(source / parent)

    def write(folder: Path, name: str) -> None:
        for part, patterns in (UPLOADED | conditions).items():
            if (source / part).is_dir():
                copy_files(source / part, make_folder(folder / part), patterns)
        write_card(folder, lambda license: model_card(folder, name, license), license)

    return push_folder(repo_id, write, STALE, private, **options)


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
        names = [INDEX_NAME, "config.json", CHECKSUMS_NAME, f"{JANUS}/{CHECKSUMS_NAME}", "vqgan/*", "prior/*"]
        names += [f"{FOLDER}/*.json", f"{FOLDER}/*.safetensors"]
        wanted = [str(inside / name) for name in names]
        folder = Path(snapshot_download(str(name), allow_patterns=wanted, **download))
    folder /= inside
    finish_interrupted(folder)
    if not (folder / INDEX_NAME).is_file():
        below = folder / "pipeline"  # of a run of all steps
        hint = f"; did you mean {below}?" if (below / INDEX_NAME).is_file() else ""
        raise FileNotFoundError(f"{folder} holds no pipeline: {INDEX_NAME} is missing{hint}")
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
        "prior": load_language_model(folder / "prior", layout.family, trust_remote_code, dtype=dtype, **attention),
        "image_processor": load_image_processor(folder / "vqgan", vqgan.config),
        "layout": layout,
        "conditions": load_conditions(folder, layout, dtype=dtype),
        "sampling_defaults": index.get(DEFAULTS),
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
    return {"tessella": own_version(), "torch": torch.__version__, "transformers": transformers.__version__}
