"""The Hugging Face Hub: valid repository names, and the upload of a finished run."""

from typing import Any

# Files of a run that are not part of the trained model: checkpoints and images (in folders), locks, logs, states.
NOT_UPLOADED = ["*/*", ".*", "*.jsonl", "*.bin"]


def is_repo_id(name: str) -> bool:
    """Whether a name is a valid Hub id."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def push_run(config: Any) -> str:
    """Uploads a finished run to the Hub: the model, its settings and results, without checkpoints or logs.

    Args:
        config: the settings of the run, with `output_dir`, `hub_model_id` and `hub_private_repo`.

    Returns:
        URL of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(config.hub_model_id, private=config.hub_private_repo, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repo_id, folder_path=config.output_dir, ignore_patterns=NOT_UPLOADED))
