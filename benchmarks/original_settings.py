"""The recipe of the original by settings of this package: `benchmarks.recipes --original`.

From Esser et al. 2021 and the released code:
- its rule for the learning rates, constant, and Adam's betas;
- no weight average, gradient clipping, k-means or restarts;
- codes as wide as the latents, not normalised, with the codebook loss of the paper;
- a discriminator that trains only once the adversarial loss has started;
- a GPT-2 with learnt positions and without dropout;
- no condition dropout, so no guidance, and no augmentation.

The sizes of models and batches, LPIPS and bfloat16 are those of the preset. As in the original, the prior of the best
evaluation is saved. Three parts of the original cannot be set: the second forward of the generator in the update of the
discriminator (it would be slower), positions that begin at zero, and class tokens that share the embeddings of codes.
"""

from typing import Any

from stage1_vqgan import Stage1Config
from stage2_prior import Stage2Config

# 4.5e-6 for every image of a batch.
RATE = 4.5e-6

STAGE1: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0,
    "adam_beta1": 0.5,
    "adam_beta2": 0.9,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "ema_decay": 0.0,
    "codebook.kmeans_init_batches": 0,
    "codebook.restart_interval": 0,
    "model.quantizer": "vq",
    "model.quantizer_options": {"commitment_cost": 0.25},
    "loss.l1_weight": 1.0,
    "loss.l2_weight": 0.0,
    "loss.adversarial_weight": 0.8,
    "data.augmentation": {},
    "discriminator.learning_rate": None,
}
STAGE2: dict[str, Any] = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "max_grad_norm": 0.0,
    "ema_decay": 0.0,
    "condition_dropout": 0.0,
    "num_views": 1,
    "data.augmentation": {},
}


def of_stage1(config: Stage1Config) -> dict[str, Any]:
    """What changes the settings of a tokenizer to those of the original."""
    return STAGE1 | {
        "learning_rate": RATE * config.per_device_train_batch_size,
        "loss.discriminator_start_step": config.loss.adversarial_start_step,
        "model.embed_dim": config.vqgan_config().latent_channels,
    }


def of_stage2(config: Stage2Config) -> dict[str, Any]:
    """What changes the settings of a code store and its prior to those of the original."""
    prior = config.model
    model = {
        "model_type": "gpt2",
        "n_embd": prior["hidden_size"],
        "n_layer": prior["num_hidden_layers"],
        "n_head": prior["num_attention_heads"],
        "activation_function": "gelu",
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": False,
    }
    return STAGE2 | {"learning_rate": RATE * config.per_device_train_batch_size, "model": model}
