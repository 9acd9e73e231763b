"""The files of a trained prior that are uploaded."""

from pathlib import Path

from configs.checksums import write_checksums
from configs.hub import is_repo_id
from configs.uploads import RUN_FILES, copy_files, copy_run
from stage2_prior.adapters import base_of_adapter
from stage2_prior.prior import load_prior


def export_prior(source: Path, target: Path) -> None:
    """Copies the files of a run that are uploaded. A stranger can load them, also if the run trained an adapter.

    An adapter of a prior on the Hub names that prior. An adapter of a prior in a local folder is merged into it.

    Raises:
        ConfigError: the prior of the adapter cannot be loaded.
    """
    base = base_of_adapter(source, "output_dir")
    if base is None or (is_repo_id(base) and not Path(base).is_dir()):
        copy_run(source, target)
    else:
        load_prior(str(source), "output_dir").save_pretrained(target)
        copy_files(source, target, RUN_FILES)
        write_checksums(target)
