"""Entry point of stage 1: `accelerate launch -m stage1_vqgan.train CONFIG [--key value ...]`."""

from configs import run
from stage1_vqgan.training import train
from stage1_vqgan.training_config import Stage1Config

if __name__ == "__main__":
    run(Stage1Config, train, "accelerate launch -m stage1_vqgan.train")
