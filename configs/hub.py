"""The Hugging Face Hub: valid repository names, and the upload of a finished run."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.disk_space import DiskFull, naming_full_disk
from configs.problems import ConfigError, Problem, one_line
from configs.uploads import check_upload

# Files that an earlier upload may have left in the repository, and that must not mix with the files of this one.
STALE = ("model*.safetensors*", "adapter_*", "checksums.json")

STATUS_ADVICE = {
    401: "the Hub does not accept your login; run `hf auth login` with a token that may write",
    403: "your token must not write to this repository; run `hf auth login` with one that may, or choose another name",
    404: "there is no such repository, or you must not see it; check the name and your login",
}


def is_repo_id(name: str) -> bool:
    """Whether a name is a valid Hub id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def push_run(config: Any, export: Callable[[Path, Path], None]) -> str:
    """Uploads a finished run to the Hub: the model, its settings and results, and no other file of the folder.

    Args:
        config: the settings of the run, with `output_dir`, `hub_model_id` and `hub_private_repo`.
        export: writes the files to upload from the first folder into the second.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: the upload failed.
        DiskFull: the folder for temporary files has too little space.
    """
    from huggingface_hub import HfApi

    with upload_errors(config.output_dir), tempfile.TemporaryDirectory() as folder:
        with naming_full_disk(folder):
            export(Path(config.output_dir), Path(folder))
        check_upload(folder)
        api = HfApi()
        repo_id = api.create_repo(config.hub_model_id, private=config.hub_private_repo, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, delete_patterns=list(STALE)))


@contextmanager
def upload_errors(output_dir: str | Path) -> Iterator[None]:
    """Turns errors of an upload into one that says where the model is, why it was not uploaded, and how to go on.

    Raises:
        ConfigError: an error inside the context.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the class of the library's client

    try:
        yield
    except DiskFull:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        message = f"the model is saved in {output_dir}, but was not uploaded: {_reason(error)}"
        raise ConfigError([Problem("push_to_hub", f"{message}. The same command uploads it")], "upload") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, ConfigError):
        return "; ".join(map(str, error.problems))
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids connections; unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return STATUS_ADVICE[401]
    if status in STATUS_ADVICE:
        return STATUS_ADVICE[status]
    return one_line(error)
