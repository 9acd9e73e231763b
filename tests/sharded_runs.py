"""Stage 2 with its weights spread over two processes (FSDP 2), for tests/stage2_prior/training/test_sharded.py.

accelerate shards models on GPUs only. PyTorch shards on a CPU in the same way, so accelerate is patched to ask for it.
"""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.tensor import DTensor

from stage2_prior import Stage2Config
from stage2_prior.training.run import RunCallback, train
from tests import forks, process_runs

CONFIG_FILE = Path(__file__).parents[1] / "configs" / "accelerate" / "fsdp.yaml"


def config(folder: Path, name: str) -> Stage2Config:
    changes: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "logging_steps": 1, "ema_decay": 0.5}
    changes |= {"gradient_accumulation_steps": 2, "num_sample_images": 2}
    return process_runs.stage2_config(folder, output_dir=str(folder / name), **changes)


def run_on_two_processes(folder: Path) -> None:
    """Runs once without interruption, and once with a resume. `folder` holds tokenizer and codes."""
    command = ["--config_file", str(CONFIG_FILE), "--num_processes", "2", "-m", "stage2_prior.train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    environment = prepare_multi_gpu_env(arguments)
    forks.run_on_two_processes(_run, folder, log=folder / "log.txt", environment=environment)


def _run(folder: Path) -> None:
    _shard_on_cpus()
    RunCallback.on_substep_end = _check_shards  # type: ignore[method-assign]
    train(config(folder, "sharded"))
    if PartialState().is_main_process:
        interrupted = Path(shutil.copytree(folder / "sharded", folder / "resumed"))
        shutil.rmtree(interrupted / "checkpoint-6")
        for name in ("model.safetensors", "train_results.json"):
            (interrupted / name).unlink()
    PartialState().wait_for_everyone()
    train(config(folder, "resumed"))


def _shard_on_cpus() -> None:
    start = AcceleratorState.__init__

    def start_and_shard(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = start_and_shard  # type: ignore[method-assign]


def _check_shards(callback: Any, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
    for name, weight in model.named_parameters():
        assert isinstance(weight, DTensor) and 2 * weight.to_local().numel() == weight.numel(), name
