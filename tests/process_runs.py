"""Runs of both stages that save the final state of each process; for tests/test_processes.py."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState

from configs import load_config
from stage1_vqgan import DataConfig, Stage1Config
from stage1_vqgan.evaluate import ReconstructionConfig, evaluate
from stage1_vqgan.evaluation import networks
from stage1_vqgan.evaluation.config import MetricsConfig
from stage1_vqgan.quantizers import build_quantizer
from stage1_vqgan.training import components, run as stage1
from stage1_vqgan.training.codebook import Candidates, CodebookMonitor, kmeans
from stage1_vqgan.training.loss_config import LossConfig
from stage1_vqgan.training.run import Training
from stage1_vqgan.training.step import VQGANTrainer
from stage2_prior import Stage2Config
from stage2_prior.tokenize import tokenize
from stage2_prior.training import run as prior_training
from tests import tiny
from tests.feature_networks import small_network

GLOBAL_BATCH = 32

# name, K, D and options of every quantizer with trainable weights
QUANTIZERS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("vq", 64, 4, {}),
    ("vq", 64, 4, {"l2_normalize": True}),
    ("vq", 64, 4, {"entropy_weight": 0.1, "entropy_temperature": 0.5}),
    ("vq", 64, 4, {"rotation_trick": True}),
    ("ema", 64, 4, {"decay": 0.9}),
    ("simvq", 64, 4, {}),
    ("ibq", 64, 4, {"entropy_temperature": 0.5}),
    ("gumbel", 64, 4, {"kl_weight": 0.01}),
    ("residual", 64, 4, {"shared_codebook": True}),
    ("pyramid", 64, 4, {"hidden_channels": 8}),
]
# settings of tokenizers whose loss, codebook or noise depends on all processes
WHOLE: dict[str, dict[str, Any]] = {"lfq": {"quantizer": "lfq", "embed_dim": 6, "num_embeddings": 64}}
FURTHER: dict[str, dict[str, Any]] = {  # of slow tests
    "ema": {"quantizer": "ema"},
    "gumbel": {"quantizer": "gumbel", "quantizer_options": {"kl_weight": 0.01}},
    "bsq": {"quantizer": "bsq", "embed_dim": 6, "num_embeddings": 64},
}
# settings of runs whose losses and discriminator use frozen networks
NETWORK = {"network": "timm/test_resnet@32", "network_weights": "random"}
NETWORKS: dict[str, dict[str, Any]] = {
    "features": {
        "loss": {
            "perceptual_weight": 0,
            **{f"{term}_weight": 0.5 for term in ("features", "logits", "alignment")},
            **{f"{term}_{key}": NETWORK[key] for term in ("features", "logits", "alignment") for key in NETWORK},
        },
        "discriminator": {"type": "features", **NETWORK},
    },
}
STYLEGAN = {"type": "stylegan", "base_channels": 4, "augmentation": True}  # of the run "lfq"
# Adam divides a gradient by its running size plus ε. With the usual ε of 1e-8, a gradient that is only a rounding error
# moves its weight by a whole learning rate, in a direction that depends on the order of sums. With an ε as large as a
# usual gradient of these runs, an error δ of a gradient moves the weight by at most 2 · learning rate · δ / ε.
ADAM_EPSILON = 1e-3


def stage1_config(folder: Path, **changes: Any) -> Stage1Config:
    values = {
        "output_dir": str(folder / "vqgan"),
        "max_steps": 10,
        "global_batch_size": GLOBAL_BATCH,
        "per_device_eval_batch_size": 180,
        "learning_rate": 1e-4,
        "warmup_steps": 2,
        "logging_steps": 5,
        "report_to": [],
        "model": {**tiny.VQGAN, "num_embeddings": 256},
        "data": dict(tiny.DATA),
        "loss": {
            "perceptual_weight": 0,
            "l2_weight": 0.5,
            "adversarial_weight": 0.5,
            "adversarial_type": "hinge",
            "generator_type": "non_saturating",
            "adversarial_start_step": 3,
            "gradient_penalty_weight": 0.5,
            "r1_weight": 0.5,
            "lecam_weight": 0.1,
            "schedules": {"adversarial": {"ramp": 3}, "l2": {"end_weight": 0.1}},
        },
        "discriminator": {"base_channels": 8, "num_layers": 2, "norm_type": "actnorm", "adam_beta1": 0.5},
        "perturbation": {"image_share": 0.5, "neighbours": 20},
        "codebook": {"kmeans_init_batches": 2, "restart_interval": 4},
    }
    return load_config(Stage1Config, overrides={**values, **changes})


def stage2_config(folder: Path, **changes: Any) -> Stage2Config:
    values = {
        "tokenizer": str(folder / "vqgan"),
        "code_store": str(folder / "codes"),
        "output_dir": str(folder / "prior"),
        "data": dict(tiny.DATA),
        "num_views": 2,
        "max_steps": 10,
        "global_batch_size": GLOBAL_BATCH,
        "per_device_eval_batch_size": 100,
        "learning_rate": 1e-3,
        "logging_steps": 5,
        "condition_dropout": 0.2,
        "model": dict(tiny.LLAMA),
        "report_to": [],
        "training_arguments": {"adam_epsilon": ADAM_EPSILON},
    }
    return load_config(Stage2Config, overrides={**values, **changes})


def leave(folder: Path, name: str, state: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"{name}-{PartialState().process_index}.pt")


@contextmanager
def large_epsilon() -> Iterator[None]:
    """Inside this context, new trainers of stage 1 use ADAM_EPSILON."""
    build = components._optimizer

    def build_with_epsilon(model: torch.nn.Module, setting: Callable[[str], float]) -> torch.optim.Optimizer:
        optimizer = build(model, setting)
        for group in optimizer.param_groups:
            group["eps"] = ADAM_EPSILON
        return optimizer

    with patch.object(components, "_optimizer", build_with_epsilon):
        yield


def run_stage1(config: Stage1Config, folder: Path, name: str = "stage1", bypass: bool = False) -> None:
    """Trains; saves generator, discriminator, moving average and number of restarted codes of this process."""
    finish, restart, step = Training.finish, VQGANTrainer._restart_dead_codes, VQGANTrainer.step
    restarted = []

    def finish_and_leave(training: Training) -> Any:
        trainer, accelerator = training.trainer, training.accelerator
        parts = {"generator": trainer.model, "average": trainer.average, "discriminator": trainer.discriminator}
        if trainer.alignment is not None:
            parts["alignment"] = trainer.alignment
        state = {key: accelerator.unwrap_model(part).state_dict() for key, part in parts.items()}
        leave(folder, name, {**state, "restarted": sum(restarted)})
        return finish(training)

    def restart_and_count(trainer: VQGANTrainer) -> Any:
        found = restart(trainer)
        restarted.append(int(found.get("codebook/restarted", 0)))
        return found

    def step_without_wrapper(trainer: VQGANTrainer, *args: Any) -> Any:
        trainer.generator = trainer.model  # a faulty version: the wrapper averages the gradients
        return step(trainer, *args)

    patched: Any = VQGANTrainer
    Training.finish, patched._restart_dead_codes = finish_and_leave, restart_and_count  # type: ignore[method-assign]
    patched.step = step_without_wrapper if bypass else step
    try:
        with large_epsilon():
            stage1.train(config)
    finally:
        Training.finish, patched._restart_dead_codes, patched.step = finish, restart, step  # type: ignore[method-assign]


def run_stage2(config: Stage2Config, folder: Path, name: str = "stage2") -> None:
    """Trains; saves the prior of this process and the average of its weights."""
    evaluate = prior_training.PriorTrainer.evaluate

    def evaluate_and_leave(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        states = {"weights": copy.deepcopy(trainer.model.state_dict())}
        with trainer.average.applied():
            leave(folder, name, {**states, "average": trainer.model.state_dict()})
        return evaluate(trainer, *args, **kwargs)

    prior_training.PriorTrainer.evaluate = evaluate_and_leave  # type: ignore[method-assign]
    try:
        prior_training.train(config)
    finally:
        prior_training.PriorTrainer.evaluate = evaluate  # type: ignore[method-assign]


def run_quantizer(folder: Path, name: str, codes: int, width: int, options: dict[str, Any]) -> None:
    """Updates a quantizer 50 times on this process's part of fixed latents, and saves its state.

    A quantizer with a codebook also has k-means and restarts.
    """
    accelerator = Accelerator()
    torch.manual_seed(0)
    quantizer = build_quantizer(name, codes, width, options)
    parameters = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    # Not Adam: an entry on its only latent has a gradient of rounding errors, which Adam would normalise to full steps.
    optimizer = torch.optim.SGD(parameters or [torch.zeros(1)], lr=0.1, momentum=0.9)
    wrapped = accelerator.prepare(quantizer) if parameters else quantizer
    monitor = CodebookMonitor(codes, accelerator.device, quantizer.num_entries // codes)
    seeds = range(8)
    share = slice(*(len(seeds) * (accelerator.process_index + end) // accelerator.num_processes for end in (0, 1)))
    everything = torch.randn(50, 8, width, 3, 3, generator=torch.Generator().manual_seed(1))
    latents = everything[:, share]

    def reduce(value: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(value.clone(), "sum")

    for index, codebook in enumerate(quantizer.codebooks):
        rows = quantizer.inputs(everything[0])[index]
        codebook.place_entries(kmeans(rows, codes, codebook.l2_normalize, seed=0))
    restarted = 0
    for step, z in enumerate(latents):
        quantizer.prepare(step / 50, seeds[share])
        out = wrapped(z)
        monitor.update(quantizer.entry_numbers(out.codes, z.shape[2:]))
        quantizer.observe(z, out.codes)
        if parameters:
            accelerator.backward(out.loss + (out.quantized - z).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        quantizer.update(reduce)
        if quantizer.codebooks and step % 5 == 4:
            candidates = []
            for rows in quantizer.inputs(z):
                sample = Candidates(codes)
                sample.add(accelerator.gather(rows), seed=step)
                candidates.append(sample.rows())
            restarted += int(monitor.restart(quantizer, quantizer, optimizer, candidates, reduce))
    leave(folder, f"quantizer {name} {'-'.join(options)}", {**quantizer.state_dict(), "restarted": restarted})


def measure(folder: Path, tokenizer: Path) -> None:
    """Measures a tokenizer on 1,437 images, a number that neither two processes nor a batch divide."""
    config = ReconstructionConfig(
        model=str(tokenizer),
        data=DataConfig(dataset="digits"),
        split="train",
        metrics=MetricsConfig(perceptual_networks=[], feature_networks=["small"]),
        output_dir=str(folder),
        per_device_eval_batch_size=50,
    )
    with patch.object(networks, "load_network", small_network):
        evaluate(config)


GAMES = [
    *itertools.product(["hinge", "vanilla", "non_saturating"], ["group", "actnorm"], ["", "gradient_penalty", "lecam"]),
    *itertools.product(["wasserstein"], ["group", "actnorm"], ["gradient_penalty", "r1", "lecam"]),
]


def run_games(folder: Path) -> None:
    """Four steps with every adversarial loss on eight images in two micro-batches; saves both models."""
    accelerator = Accelerator(gradient_accumulation_steps=2)
    images = torch.rand(8, 2, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for kind, norm_type, penalty in GAMES:
        config = stage1_config(folder, gradient_accumulation_steps=2)
        config.loss = LossConfig(perceptual_weight=0, adversarial_type=kind)  # type: ignore[arg-type]
        if penalty:
            setattr(config.loss, f"{penalty}_weight", 0.5)
        config.discriminator.norm_type = norm_type  # type: ignore[assignment]
        with large_epsilon():
            trainer = VQGANTrainer(config, accelerator)
        layers = accelerator.unwrap_model(trainer.discriminator).main
        for number, layer in enumerate(layers):
            if isinstance(layer, torch.nn.LeakyReLU):  # its gradient jumps where rounding changes a sign
                layers[number] = torch.nn.SiLU()
        with torch.no_grad():
            layers[-1].weight.mul_(30)  # makes all gradients large
        for number, global_batch in enumerate(images):
            trainer.set_learning_rate(number // 2)
            batch = global_batch.chunk(accelerator.num_processes)[accelerator.process_index]
            trainer.step(batch, number)
        parts = {"generator": trainer.generator, "discriminator": trainer.discriminator}
        state = {key: accelerator.unwrap_model(part).state_dict() for key, part in parts.items()}
        leave(folder / "states", "-".join(filter(None, (kind, norm_type, penalty))), state)
        accelerator.free_memory()


def run_whole(folder: Path, name: str) -> None:
    """Trains one of the tokenizers in WHOLE and FURTHER."""
    model = {**tiny.VQGAN, **(WHOLE | FURTHER)[name]}
    # no clipping, so that the scale of the gradients is compared too
    changes = {"max_steps": 5, "max_grad_norm": 0, "model": model, "output_dir": str(folder / name)}
    changes |= {"discriminator": STYLEGAN} if name == "lfq" else {}
    run_stage1(stage1_config(folder, **changes), folder / "states", name)


def run_all(folder: Path, other: Path) -> None:
    """Runs everything. Stage 2 uses the tokenizer in `other`, so that it trains on the same codes.

    Tokenizers that were trained on different numbers of processes differ by rounding, which can change a code.
    """
    run_stage1(stage1_config(folder), folder / "states")
    for quantizer in QUANTIZERS:
        run_quantizer(folder / "states", *quantizer)
    for name in WHOLE:
        run_whole(folder, name)
    for name, settings in NETWORKS.items():
        changes = {"max_steps": 4, "max_grad_norm": 0, **settings, "output_dir": str(folder / name)}
        run_stage1(stage1_config(folder, **changes), folder / "states", name)
    config = stage2_config(folder, tokenizer=str(other / "vqgan"), num_views=1)
    tokenize(config)
    measure(folder / "measured", other / "vqgan")
    run_stage2(config, folder / "states")
    model = {**tiny.BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    masked = {"tokenizer": str(other / "vqgan"), "output_dir": str(folder / "masked"), "prior": "masked"}
    run_stage2(stage2_config(folder, **masked, num_views=1, model=model), folder / "states", "masked")


def run_all_on_two(folder: Path, other: Path) -> None:
    """Runs everything, and four steps of a faulty version that does not average the gradients of the generator."""
    run_all(folder, other)
    run_stage1(stage1_config(folder / "bypassed", max_steps=4), folder / "states", "bypassed", bypass=True)
