"""Uploads a saved pipeline, or the folder of a finished run, to the Hugging Face Hub.

Usage: `python -m pipelines.push FOLDER --hub_model_id user/name`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs import ConfigError, Problem, Section, run
from configs.hub import check_push, push_folder, upload_errors
from configs.sections import name_problem


@dataclass(kw_only=True)
class PushConfig(Section):
    """Uploads a pipeline, a tokenizer or a prior, with its card, in one commit.

    folder: a saved pipeline, or the output_dir of a finished training
    hub_model_id: repository of the upload, as "user/name"; it is created if it does not exist
    hub_private_repo: make a new repository private; null leaves this to the Hub
    license: license of the model, an identifier of the Hub such as apache-2.0; its model card states it
    """

    positional = "folder"

    folder: str
    hub_model_id: str
    hub_private_repo: bool | None = None
    license: str | None = None

    def library_problems(self) -> Iterable[tuple[str, Any, str]]:
        if problem := name_problem(self.hub_model_id):
            yield "hub_model_id", self.hub_model_id, problem


def kind_of(folder: Path) -> str | None:
    """What a folder holds: "pipeline", "prior" or "tokenizer"; None for anything else."""
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    return "prior" if (folder / "token_layout.json").is_file() else "tokenizer"


def push(config: PushConfig) -> str:
    """Uploads the folder, and prints the address of the commit.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: the folder holds no model, or the upload failed.
    """
    source = Path(config.folder)
    if kind_of(source) is None:
        allowed = "must be the folder of a saved pipeline, or of a finished training of a tokenizer or a prior"
        below = source / "pipeline"  # of a run of all steps
        hint = f"; did you mean {below}?" if kind_of(below) else ""
        raise ConfigError([Problem("folder", f"received {config.folder!r}; {allowed}{hint}")])
    check_push(config.hub_model_id, config.hub_private_repo, config.license)
    with upload_errors(config.folder, config.hub_model_id):
        url = _push(config, source)
    print(f"uploaded to {url}")
    return url


def _push(config: PushConfig, source: Path) -> str:
    name, private, license = config.hub_model_id, config.hub_private_repo, config.license
    # These imports are slow, so they come after the check of the arguments.
    if kind_of(source) == "pipeline":
        from pipelines.hub import push_saved

        return push_saved(name, source, private, license)
    if kind_of(source) == "prior":
        from stage2_prior.export import export_prior as export
    else:
        from stage1_vqgan.model_card import export_tokenizer as export
    return push_folder(name, lambda folder, repo: export(source, folder, repo, license), private=private)


if __name__ == "__main__":
    run(PushConfig, push, "python -m pipelines.push")
