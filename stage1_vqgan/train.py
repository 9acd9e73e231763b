"""Entry point of stage 1: `accelerate launch -m stage1_vqgan.train CONFIG [--key value ...]`."""

from configs import run
from stage1_vqgan.training.config import Stage1Config


def main(config: Stage1Config) -> object:
    """Imports torch here, because its import is slow and the check of the arguments must not wait for it."""
    from stage1_vqgan.training.run import train

    return train(config)


if __name__ == "__main__":
    run(Stage1Config, main, "accelerate launch -m stage1_vqgan.train")
