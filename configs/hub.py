"""The Hugging Face Hub: names of repositories, and uploading a finished run."""

from typing import Any


def is_repo_id(name: str) -> bool:
    """Whether a repository on the Hub can have this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def push_run(config: Any) -> str:
    """Uploads the files of a finished run (the model, its settings and results; no checkpoints or logs) to the Hub.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(config.hub_model_id, private=config.hub_private_repo, exist_ok=True).repo_id
    left_out = ["*/*", ".*", "*.jsonl", "*.bin"]
    return str(api.upload_folder(repo_id=repo_id, folder_path=config.output_dir, ignore_patterns=left_out))
