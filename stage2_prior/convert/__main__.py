"""Entry point: `python -m stage2_prior.convert --from taming --checkpoint FILE --output_dir DIR`."""

from configs import run
from stage2_prior.convert.config import ConvertConfig


def main(config: ConvertConfig) -> None:
    """Imports torch here, because its import is slow and the check of the arguments must not wait for it."""
    from stage2_prior.convert.command import convert

    convert(config)


if __name__ == "__main__":
    run(ConvertConfig, main, "python -m stage2_prior.convert")
