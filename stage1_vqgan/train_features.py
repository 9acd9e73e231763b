"""Entry point that trains a feature network: `accelerate launch -m stage1_vqgan.train_features --key value ...`."""

from configs import run
from stage1_vqgan.features.config import FeaturesConfig


def main(config: FeaturesConfig) -> object:
    """Imports torch here, because its import is slow and the check of the arguments must not wait for it."""
    from stage1_vqgan.features.run import train

    return train(config)


if __name__ == "__main__":
    run(FeaturesConfig, main, "accelerate launch -m stage1_vqgan.train_features")
