"""The Hugging Face Hub: valid repository names, checks before a training, and uploads in one commit."""

import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.card import CARD_NAME
from configs.disk_space import DiskFull, naming_full_disk
from configs.problems import ConfigError, Problem, one_line
from configs.uploads import check_upload

# Files that an earlier upload may have left in the repository, and that must not mix with the files of this one.
STALE = ("model*.safetensors*", "adapter_*", "checksums.json", "card/*")

STATUS_ADVICE = {
    401: "the Hub does not accept your login; run `hf auth login` with a token that may write",
    403: "your token must not write to this repository; run `hf auth login` with one that may, or choose another name",
    404: "there is no such repository, or you must not see it; check the name and your login",
    429: "the Hub has received too many requests from you; wait some minutes",
}


def is_repo_id(name: str) -> bool:
    """Whether a name is a valid Hub id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_push(
    repo_id: str, private: bool | None = None, license: str | None = None, field: str = "hub_model_id"
) -> None:
    """Creates the repository of a later upload, and asks the Hub whether the login may write to it.

    A run calls it before it trains, in its main process.

    Args:
        repo_id: the repository.
        private: whether to create it as private; None leaves this to the Hub.
        license: an identifier of a license, which the Hub must know.
        field: setting that names the repository, for the message.

    Raises:
        ConfigError: an upload would fail.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # the class of the library's client

    api = HfApi()
    try:
        if license is not None:
            ModelCard(f"---\nlicense: {license}\n---\n").validate()
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        message = f"received {license!r}; {_words_of_hub(error)}"
        raise ConfigError([Problem("license", message)], "upload") from error
    try:
        api.whoami()
        api.auth_check(api.create_repo(repo_id, private=private, exist_ok=True).repo_id, write=True)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        message = f"received {repo_id!r}; an upload would fail: {_reason(error)}"
        raise ConfigError([Problem(field, message)], "upload") from error


def push_run(config: Any, export: Callable[[Path, Path, str], None] | None) -> str:
    """Uploads a finished run to the Hub: the model, its card, its settings and results, and nothing else of the folder.

    Args:
        config: the settings of the run, with `output_dir`, `hub_model_id` and `hub_private_repo`.
        export: writes the files to upload from the first folder into the second; the text is the repository's name.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: the upload failed.
        DiskFull: the folder for temporary files has too little space.
    """
    assert export is not None, "only runs that upload nothing have no export"
    with upload_errors(config.output_dir, config.hub_model_id):
        return push_folder(
            config.hub_model_id,
            lambda folder, name: export(Path(config.output_dir), folder, name),
            private=config.hub_private_repo,
        )


def push_folder(
    repo_id: str,
    write: Callable[[Path, str], None],
    stale: Iterable[str] = STALE,
    private: bool | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Uploads a folder in one commit, so that nobody ever sees files of two models together.

    `HfApi.upload_folder` may make several commits.

    Args:
        repo_id: the repository; created if it does not exist.
        write: writes the files to upload into a folder, in which it finds the README.md of the repository, if there is
            one. The text is the repository's name with its owner.
        stale: patterns of files in the repository that are removed if the folder does not hold them.
        private: whether to create the repository as private.
        token: by default that of the login.
        **options: passed to `HfApi.create_commit`.

    Returns:
        URL of the commit.

    Raises:
        ValueError: a file holds a secret or the path of the home folder.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import filter_repo_objects

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    present = api.list_repo_files(repo_id, revision=options.get("revision"))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "upload")
        folder.mkdir()
        if CARD_NAME in present:
            revision = options.get("revision")
            card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, cache_dir=Path(parent, "cache"))
            (folder / CARD_NAME).write_bytes(Path(card).read_bytes())
        with naming_full_disk(folder):
            write(folder, repo_id)
        check_upload(folder, token)
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        removed = [name for name in filter_repo_objects(present, allow_patterns=list(stale)) if name not in paths]
        operations = [CommitOperationAdd(name, path) for name, path in paths.items()]
        deletions = [CommitOperationDelete(name) for name in removed]
        options.setdefault("commit_message", "Upload model")
        return str(api.create_commit(repo_id, [*deletions, *operations], **options))


@contextmanager
def upload_errors(output_dir: str | Path, repo_id: str | None) -> Iterator[None]:
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
        command = shlex.join(["tessella", "push", os.fspath(output_dir), "--hub_model_id", str(repo_id)])
        raise ConfigError([Problem("push_to_hub", f"{message}. Then upload it: {command}")], "upload") from error


def _words_of_hub(error: Exception) -> str:
    """Why the Hub refuses the metadata of a card: it answers with a list of errors, as JSON."""
    try:
        return "; ".join(problem["message"] for problem in json.loads(str(error))["errors"])
    except (ValueError, LookupError, TypeError):
        return _reason(error)


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
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # names only the file
        return f"{one_line(error)} {_reason(error.__cause__)}"
    return one_line(error)
