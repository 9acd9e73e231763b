"""Entry point of stage 1: `accelerate launch -m stage1_vqgan.train CONFIG [--key value ...]`."""

from configs import run
from stage1_vqgan.training.config import Stage1Config
from stage1_vqgan.training.run import train

if __name__ == "__main__":
    run(Stage1Config, train, "accelerate launch -m stage1_vqgan.train")
