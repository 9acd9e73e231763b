"""The files of a trained prior that are uploaded, and its card."""

from pathlib import Path

from configs.card import write_card
from configs.card_facts import collect_run, run_license
from configs.checksums import write_checksums
from configs.hub import is_repo_id
from configs.uploads import RUN_FILES, copy_files, copy_run
from stage2_prior.adapters import base_of_adapter
from stage2_prior.condition_tokenizers import copy_tokenizers
from stage2_prior.model_card import PANELS, PICTURES, prior_card
from stage2_prior.prior import load_prior
from stage2_prior.vocabulary import TokenLayout


def export_prior(source: Path, target: Path, name: str, license: str | None = None) -> None:
    """Writes what is uploaded of a run. A stranger can load it, also if the run trained an adapter.

    An adapter of a prior on the Hub names that prior. An adapter of a prior in a local folder is merged into it.

    Raises:
        ConfigError: the prior of the adapter cannot be loaded.
    """
    copy_model(source, target)
    copy_tokenizers(source, target, TokenLayout.from_pretrained(source))
    collect_run(source, target, "prior", PANELS, PICTURES)
    write_card(target, lambda license: prior_card(target, name, license), license or run_license(source))


def copy_model(source: Path, target: Path) -> None:
    """Writes the model, its settings and its results; see `export_prior`."""
    base = base_of_adapter(source, "output_dir")
    if base is None or (is_repo_id(base) and not Path(base).is_dir()):
        copy_run(source, target)
    else:
        load_prior(str(source), "output_dir").save_pretrained(target)
        copy_files(source, target, RUN_FILES)
        write_checksums(target)
