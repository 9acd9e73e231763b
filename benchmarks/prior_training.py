"""A training step of stage 2, compared with transformers' Trainer with default settings on the same codes.

The peer is `Trainer(model, TrainingArguments(...), train_dataset)`, the usual code without this package. Its data set
is a `datasets.Dataset` with lists `input_ids` (a condition token, then the codes) and `labels`. Architecture, weights,
batch size and precision are the same in all lanes, and the optimizer is Trainer's default. The weight average is off,
because the peer has none. "compiled" lanes set `torch_compile` true; they are measured on a GPU. The setting in
bfloat16 on a CPU, whose narrow heads compute attention in float32 here, also has this project's step in float32.

Before the measurement, the losses of three steps on the same batches are compared, with attention dropout 0.
"""

import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.case import OURS, Case, Prepared
from configs import load_config
from configs.run_folder import RunFolder
from stage2_prior import Stage2Config, TokenLayout
from stage2_prior.code_store import CodeSplit, shard_path
from stage2_prior.data import CodeDataset
from stage2_prior.prior import build_prior
from stage2_prior.shards import write_shard
from stage2_prior.training.averaging import WeightAverage
from stage2_prior.training.cpu_attention import choose_attention
from stage2_prior.training.run import training_arguments
from stage2_prior.training.selection import BestWeights
from stage2_prior.training.throughput import training_flops
from stage2_prior.training.trainer import PriorTrainer


class Setting(NamedTuple):
    """A preset, changes of its settings, and the codebook size, grid and classes of the codes."""

    preset: str
    num_codes: int
    grid: tuple[int, int]
    classes: int
    changes: dict[str, Any]


def llama(layers: int, width: int, heads: int, batch: int) -> Setting:
    """The prior of the ImageNet preset in a size of LlamaGen."""
    inner = -(-width * 8 // 3 // 256) * 256
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    changes = {f"model.{name}": value for name, value in sizes.items()}
    return Setting("imagenet256/stage2", 16384, (16, 16), 1000, {**changes, "per_device_train_batch_size": batch})


SETTINGS: dict[str, dict[str, Setting]] = {
    "cpu": {
        "digits": Setting("digits/stage2", 256, (4, 4), 10, {}),
        "fashion_mnist": Setting(
            "fashion_mnist/stage2", 512, (8, 8), 10, {"bf16": False, "per_device_train_batch_size": 32}
        ),
        "fashion_mnist/cpu, bfloat16": Setting("fashion_mnist/cpu/stage2", 1024, (7, 7), 10, {"bf16": True}),
    },
    "gpu": {
        "111M, batch 128": llama(12, 768, 12, 128),
        "343M, batch 64": llama(24, 1024, 16, 64),
        "775M, batch 64": llama(36, 1280, 20, 64),
    },
}
SETTINGS["tiny"] = {
    f"tiny {name}": llama(2, 64, 2, 4)._replace(num_codes=64, grid=(4, 4), classes=10) for name in SETTINGS["gpu"]
}
ALL_SETTINGS = {name: setting for settings in SETTINGS.values() for name, setting in settings.items()}
PLAIN = "plain Trainer"
FLOAT32 = f"{OURS}, float32"
ROWS = 8192

# The optimizer has the defaults of TrainingArguments. The run only takes steps: no logs, evaluations or checkpoints.
COMMON = {
    "max_steps": 10**6,
    "eval_steps": 10**6,
    "save_steps": 10**6,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "ema_decay": 0.0,
    "report_to": [],
    "dataloader_num_workers": 0,
    "training_arguments.disable_tqdm": True,
}


def make(lane: str, setting: str, device: torch.device, folder: Path, **changes: Any) -> Trainer:
    """Builds the trainer of a lane. Weights and codes are the same in all lanes."""
    preset, num_codes, grid, classes, of_setting = ALL_SETTINGS[setting]
    values = {**COMMON, **of_setting, "output_dir": str(folder / "run"), **changes}
    values["training_arguments.torch_compile"] = lane.endswith("compiled")
    if lane == FLOAT32:
        values["bf16"] = False
    config = load_config(Stage2Config, preset, values)
    layout = TokenLayout(num_codes, tuple(map(str, range(classes))), grid, 4, "")
    generator = np.random.default_rng(0)
    codes = generator.integers(0, num_codes, (ROWS, layout.length), dtype=np.uint16)
    labels = generator.integers(0, classes, ROWS)
    for split, rows in (("train", ROWS), ("validation", 64)):
        write_shard(shard_path(folder, split, 0), codes[:rows], labels[:rows], rows)
    data = CodeDataset(CodeSplit(folder, "train", [ROWS], layout), layout, config.condition_dropout, config.seed)
    torch.manual_seed(0)
    with device:
        model = build_prior(config.model, layout)
    arguments = training_arguments(config)
    if lane.startswith(PLAIN):
        return plain_trainer(model, arguments, data, config.per_device_train_batch_size, device)
    choose_attention(model, device, arguments.bf16)
    return PriorTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=CodeDataset(
            CodeSplit(folder, "validation", [64], layout), layout
        ),  # evaluated after the last step
        layout=layout,
        run=RunFolder(config),
        average=WeightAverage(config.average_decay, is_on=False),
        best=BestWeights(folder),
    )


def plain_trainer(
    model: PreTrainedModel, ours: TrainingArguments, data: CodeDataset, batch_size: int, device: torch.device
) -> Trainer:
    """transformers' Trainer with defaults. Its rows have the same order and the same dropped conditions as ours."""
    is_check = ours.max_steps < 10
    arguments = TrainingArguments(
        output_dir=str(ours.output_dir),
        per_device_train_batch_size=batch_size,
        max_steps=ours.max_steps,
        bf16=ours.bf16,
        torch_compile=ours.torch_compile,
        logging_steps=ours.logging_steps if is_check else 500,
        train_sampling_strategy="sequential" if is_check else "random",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )
    order = np.random.default_rng((ours.seed, 0)).permutation(ROWS)
    rows = data.__getitems__(np.stack([np.zeros_like(order), order], 1))
    conditions = rows["input_ids"][:, :1]
    columns = {
        "input_ids": torch.cat([conditions, rows["labels"]], 1).tolist(),
        "labels": torch.cat([torch.full_like(conditions, -100), rows["labels"]], 1).tolist(),
    }
    return Trainer(model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(columns))


class Steps(TrainerCallback):
    """Runs a lane's trainer in its own thread. Each call lets the trainer take one step."""

    def __init__(self, lane: str, setting: str, device: torch.device):
        self.folder = tempfile.TemporaryDirectory()  # removed with this object
        self.ended = False
        self.error: BaseException | None = None
        trainer = make(lane, setting, device, Path(self.folder.name))
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.threads = torch.get_num_threads()
        trainer.add_callback(self)
        self.thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self.thread.start()
        self._join_turn()

    def _train(self, trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()

    def _join_turn(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise RuntimeError("the training ended") from self.error

    def end(self) -> None:
        """Ends the training and frees its memory."""
        self.ended = True
        self.go.release()
        self.thread.join()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()
        control.should_training_stop = self.ended

    def _wait(self) -> None:
        self.done.release()
        self.go.acquire()
        torch.set_num_threads(self.threads)  # each thread has its own setting

    def __call__(self) -> None:
        self.threads = torch.get_num_threads()
        self.go.release()
        self._join_turn()


def losses(lane: str, setting: str, device: torch.device) -> list[float]:
    """The losses of the first three steps."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"max_steps": 3, "eval_steps": 10, "save_steps": 10, "logging_steps": 1}
        trainer = make(lane, setting, device, Path(folder), **changes, **{"model.attention_dropout": 0.0})
        trainer.train()
        return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def agree(setting: str, bf16: bool, device: torch.device) -> Mapping[str, Any]:
    """The largest relative difference of a loss from the loss of the plain Trainer.

    Raises:
        AssertionError: the difference is above 1e-5, or in bfloat16 above 1e-3.
    """
    expected, found = losses(PLAIN, setting, device), losses(OURS, setting, device)
    assert len(found) == len(expected) == 3, found
    difference = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    assert difference <= (1e-3 if bf16 else 1e-5), (found, expected)
    return {"relative difference of three losses": float(f"{difference:.1e}")}


def prepared(lane: str, setting: str, device: torch.device) -> Prepared:
    """A step of a lane, after two steps for the set-up."""
    steps = Steps(lane, setting, device)
    for _ in range(2):
        steps()
    call = partial(steps)  # the thread holds all other references
    weakref.finalize(call, steps.end)
    return call


def operations(setting: str) -> float:
    """Operations of a step."""
    preset, num_codes, grid, classes, changes = ALL_SETTINGS[setting]
    config = load_config(Stage2Config, preset, {**COMMON, **changes})
    layout = TokenLayout(num_codes, tuple(map(str, range(classes))), grid, 4, "")
    with torch.device("meta"):
        model = build_prior(config.model, layout)
    tokens = config.per_device_train_batch_size * layout.length
    return tokens * training_flops(model.config, layout.length)


def cases(suite: str, device: torch.device, data: str | None) -> Iterator[Case]:
    """One case for each setting."""
    datasets.disable_progress_bars()
    compiled = [f"{OURS}, compiled"] if suite != "cpu" else []
    names = [OURS, *compiled, PLAIN, *([f"{PLAIN}, compiled"] if compiled else [])]
    for setting, (preset, _, (height, width), _, changes) in SETTINGS[suite].items():
        config = load_config(Stage2Config, preset, {**COMMON, **changes})
        more = [FLOAT32] if suite == "cpu" and config.bf16 else []
        lanes: dict[str, Callable[[], Prepared]] = {
            name: partial(prepared, name, setting, device) for name in names + more
        }
        yield Case(
            row="prior training",
            setting=setting,
            lanes=lanes,
            agree=partial(agree, setting, config.bf16, device),
            unit="tokens/s",
            count=config.per_device_train_batch_size * height * width,
            operations=partial(operations, setting),
            dtype=torch.bfloat16 if config.bf16 else torch.float32,
        )
