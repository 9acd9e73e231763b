"""Entry point: `python -m stage1_vqgan.convert --from KIND --checkpoint FILE --output DIR`."""

from configs import run
from stage1_vqgan.convert.command import ConvertConfig, convert

if __name__ == "__main__":
    run(ConvertConfig, convert, "python -m stage1_vqgan.convert")
