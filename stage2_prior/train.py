"""Entry point of stage 2: `accelerate launch -m stage2_prior.train CONFIG [--key value ...]`."""

from configs import run
from stage2_prior.training.config import Stage2Config


def main(config: Stage2Config) -> object:
    """Imports torch here, because its import is slow and the check of the arguments must not wait for it."""
    from stage2_prior.training.run import train

    return train(config)


if __name__ == "__main__":
    run(Stage2Config, main, "accelerate launch -m stage2_prior.train")
