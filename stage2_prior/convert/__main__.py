"""Entry point: `python -m stage2_prior.convert --from taming --checkpoint FILE --output_dir DIR`."""

import contextlib
import io
from importlib import import_module
from pathlib import Path

from configs import run
from stage1_vqgan import import_own
from stage2_prior.convert.config import ConvertConfig


def main(config: ConvertConfig) -> None:
    """Imports torch here, because its import is slow and the check of the arguments must not wait for it."""
    from stage2_prior.convert.command import convert

    convert(config, join)


def join(tokenizer: str, prior: Path, folder: Path) -> None:
    """Joins both into a pipeline, by the command of the package above. It is found by its name, as by `python -m`."""
    import_own("pipelines")
    joining = import_module("pipelines.build")
    with contextlib.redirect_stdout(io.StringIO()):  # it would name the temporary folder
        joining.build(joining.BuildConfig(tokenizer=tokenizer, prior=str(prior), output_dir=str(folder)))


if __name__ == "__main__":
    run(ConvertConfig, main, "python -m stage2_prior.convert")
