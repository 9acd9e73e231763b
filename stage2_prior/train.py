"""Entry point of stage 2: `accelerate launch -m stage2_prior.train CONFIG [--key value ...]`."""

from configs import run
from stage2_prior.training.config import Stage2Config
from stage2_prior.training.run import train

if __name__ == "__main__":
    run(Stage2Config, train, "accelerate launch -m stage2_prior.train")
