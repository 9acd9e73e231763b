"""Entry point: `python -m stage1_vqgan.convert --from KIND --checkpoint FILE --output DIR`."""

from configs import run
from stage1_vqgan.convert.config import ConvertConfig


def main(config: ConvertConfig) -> None:
    """Imports torch here, because its import is slow and the check of the arguments must not wait for it."""
    from stage1_vqgan.convert.command import convert

    convert(config)


if __name__ == "__main__":
    run(ConvertConfig, main, "python -m stage1_vqgan.convert")
