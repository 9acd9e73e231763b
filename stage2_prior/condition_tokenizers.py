"""The tokenizers of the conditions, and the folders that hold them.

A code store, the output folder of a run and a pipeline have a folder `conditions/<name>/` for each of these conditions:

    conditions/text/tokenizer.json                        the tokenizer of a text
    conditions/sketch/config.json, model.safetensors, …   that of a condition image, if it is not that of the images
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from configs import ConfigError, Problem
from configs.files import make_folder, read_json
from configs.hub import is_repo_id
from configs.problems import one_line
from configs.staging import replaced_files
from configs.uploads import MODEL_FILES, copy_files
from stage1_vqgan import Images, VQGANImageProcessor, VQGANModel, load_tokenizer
from stage2_prior.condition_images import transform_problem, transformed_shape
from stage2_prior.condition_sources import require_texts, training_texts
from stage2_prior.condition_text import (
    TOKENIZER_NAME,
    read_tokenizer_file,
    save_text_tokenizer,
    text_fingerprint,
    tokenizer_of,
    train_text_tokenizer,
)
from stage2_prior.conditions import Segment
from stage2_prior.training.condition_config import ConditionConfig
from stage2_prior.training.config import Stage2Config
from stage2_prior.vocabulary import TokenLayout

FOLDER = "conditions"


def text_tokenizers(config: Stage2Config, train: Images) -> dict[str, str]:
    """The `tokenizer.json` of each text condition, by its name: given, trained before for this store, or trained now.

    Raises:
        ConfigError: a tokenizer cannot be read, a column holds no text, or the images are a stream without a tokenizer.
    """
    store, found = Path(config.code_store), {}
    for name, condition in config.conditions.items():
        if condition.kind != "text":
            continue
        require_texts(name, condition, train)
        saved = store / FOLDER / name
        if condition.tokenizer is not None:
            found[name] = given_text_tokenizer(name, condition.tokenizer)
        elif (saved / TOKENIZER_NAME).is_file() and any(store.glob("*.arrow")):
            found[name] = read_tokenizer_file(saved)
        else:
            tokenizer = train_text_tokenizer(training_texts(name, condition, train), condition.vocab_size or 256)
            found[name] = tokenizer.to_str()
    return found


def given_text_tokenizer(name: str, tokenizer: str) -> str:
    """The `tokenizer.json` in a folder or Hub repository.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    key = f"conditions.{name}.tokenizer"
    folder = Path(tokenizer)
    try:
        if not folder.is_dir() and is_repo_id(tokenizer):
            folder = Path(hf_hub_download(tokenizer, TOKENIZER_NAME)).parent
        text = read_tokenizer_file(folder)
        tokenizer_of(text, folder / TOKENIZER_NAME)
        return text
    except FileNotFoundError as error:
        advice = f"it needs a {TOKENIZER_NAME}, which AutoTokenizer.from_pretrained(…).save_pretrained(folder) writes"
        raise ConfigError([Problem(key, f"received {tokenizer!r}; {advice}")]) from error
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(key, f"received {tokenizer!r}; {one_line(error, 200)}")]) from error


def image_tokenizers(config: Stage2Config, own: VQGANModel) -> dict[str, VQGANModel]:
    """The tokenizer of each condition image, for images of its size, by the name of the condition.

    Args:
        config: the settings.
        own: the tokenizer of the images.

    Raises:
        ConfigError: a tokenizer cannot be loaded, or reads no images of this size or with so many channels.
    """
    kinds = {name: condition for name, condition in config.conditions.items() if condition.kind == "image"}
    return {name: _image_tokenizer(config.tokenizer, name, condition, own) for name, condition in kinds.items()}


def _image_tokenizer(own_name: str, name: str, condition: ConditionConfig, own: VQGANModel) -> VQGANModel:
    transform, shape, key = condition.transform, condition.image_shape, "image_size"
    if transform is not None:
        key = "transform"
        if problem := transform_problem(transform, own.config.in_channels, own.config.image_shape):
            raise ConfigError([Problem(f"conditions.{name}.transform", f"received {transform!r}; {problem}")])
        shape = list(transformed_shape(transform, own.config.image_shape))
    elif shape is None and condition.tokenizer is None:
        shape = list(own.config.image_shape)
    changes: dict[str, Any] = {} if shape is None else {"image_size": shape}
    try:
        model = load_tokenizer(condition.tokenizer or own_name, f"conditions.{name}.tokenizer", **changes)
    except ConfigError as error:
        keys = {"model.image_size": f"conditions.{name}.{key}"}
        raise ConfigError(
            [replace(problem, key=keys.get(problem.key, problem.key)) for problem in error.problems]
        ) from error
    if transform is not None and model.config.in_channels != own.config.in_channels:
        message = f"received {condition.tokenizer!r}, whose images have {model.config.in_channels} channels; those of"
        message = f"{message} {transform!r} have {own.config.in_channels}, as the images themselves"
        raise ConfigError([Problem(f"conditions.{name}.tokenizer", message)])
    return model.to(own.device)  # type: ignore[arg-type]


def image_segment(name: str, condition: ConditionConfig, tokenizer: VQGANModel) -> Segment:
    """The segment of a condition image."""
    config = tokenizer.config
    return Segment(
        name,
        "image",
        config.num_embeddings,
        config.num_codes_per_image,
        grids=tuple(config.grids),
        image_shape=tuple(config.image_shape),
        fingerprint=str(config.fingerprint),
        transform=condition.transform or "",
    )


def save_tokenizers(
    config: Stage2Config, texts: Mapping[str, str], images: Mapping[str, VQGANModel], own: VQGANModel
) -> None:
    """Writes the folders of the conditions into the code store.

    Args:
        config: the settings.
        texts: see `text_tokenizers`.
        images: see `image_tokenizers`.
        own: the tokenizer of the images.

    Raises:
        ConfigError: a tokenizer of condition images has no image processor.
    """
    folder = Path(config.code_store) / FOLDER
    for name, text in texts.items():
        save_text_tokenizer(text, folder / name)
    for name, model in images.items():
        if model.config.fingerprint == own.config.fingerprint:
            continue
        source = config.conditions[name].tokenizer or config.tokenizer
        height, width = model.config.image_shape
        try:
            processor = VQGANImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            message = f"received {source!r}; its preprocessor_config.json is missing or cannot be read"
            raise ConfigError([Problem(f"conditions.{name}.tokenizer", message)]) from error
        processor.size = {"height": height, "width": width}
        with replaced_files(folder / name) as staged:
            model.save_pretrained(staged)
            processor.save_pretrained(staged)


def saved_names(layout: TokenLayout) -> dict[str, str]:
    """The file in the folder of each condition that has one, by the name of the condition."""
    files = {"text": TOKENIZER_NAME, "image": "config.json"}
    return {
        segment.name: files[segment.kind]
        for segment in layout.segments
        if segment.kind in files and segment.fingerprint != layout.tokenizer_fingerprint
    }


def require_tokenizers(folder: str | Path, layout: TokenLayout) -> None:
    """Checks that a code store, prior or pipeline has the folders of its conditions.

    Raises:
        ValueError: the tokenizer of a condition is missing, or is another one.
    """
    for name, file in saved_names(layout).items():
        path = Path(folder) / FOLDER / name / file
        (segment,) = (segment for segment in layout.segments if segment.name == name)
        if not path.is_file():
            raise ValueError(f"{path}: this file is missing; copy the folder again")
        is_text = segment.kind == "text"
        found = text_fingerprint(read_tokenizer_file(path.parent)) if is_text else read_json(path).get("fingerprint")
        if found != segment.fingerprint:
            raise ValueError(
                f"{path}: holds the tokenizer {found}, but the tokens of {name} are of {segment.fingerprint}; restore "
                "this file, or copy the folder again"
            )


def check_given_tokenizers(config: Stage2Config, layout: TokenLayout) -> None:
    """Refuses a tokenizer in the settings of a condition that is not the one of the store; one on the Hub may be.

    Raises:
        ConfigError: it is another one.
    """
    for segment in layout.segments:
        given = config.conditions[segment.name].tokenizer
        if given is None or not Path(given).is_dir():
            continue
        is_text = segment.kind == "text"
        config_file = Path(given) / "config.json"
        found = (
            text_fingerprint(given_text_tokenizer(segment.name, given))
            if is_text
            else read_json(config_file).get("fingerprint")
        )
        if found != segment.fingerprint:
            message = (
                f"received {given!r} with the fingerprint {found}, but {config.code_store} holds tokens of another"
            )
            advice = f"{message} ({segment.fingerprint}); choose another code_store and run stage2_prior.tokenize"
            raise ConfigError([Problem(f"conditions.{segment.name}.tokenizer", advice)])


def without_tokenizers(origin: dict[str, Any]) -> dict[str, Any]:
    """The origin of a code store, without what it says of the tokenizers and the classes of conditions."""
    if "conditions" not in origin:
        return origin
    decided = ("fingerprint", "class_names")
    conditions = {
        name: {key: value for key, value in condition.items() if key not in decided}
        for name, condition in origin["conditions"].items()
    }
    return origin | {"conditions": conditions}


def copy_tokenizers(source: str | Path, target: str | Path, layout: TokenLayout) -> None:
    """Copies the folders of the conditions from a code store or a run into another folder."""
    for name in saved_names(layout):
        copied = make_folder(Path(target) / FOLDER / name)
        copy_files(Path(source) / FOLDER / name, copied, (*MODEL_FILES, TOKENIZER_NAME))
