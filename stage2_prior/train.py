"""Entry point of stage 2: `accelerate launch -m stage2_prior.train CONFIG [--key value ...]`."""

from configs import run
from stage2_prior.training import train
from stage2_prior.training_config import Stage2Config

if __name__ == "__main__":
    run(Stage2Config, train, "accelerate launch -m stage2_prior.train")
