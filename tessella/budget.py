"""Minutes → optimizer steps: a training is started on trial, and its steps are timed."""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from configs.files import make_folder
from configs.run_folder import LOG_NAME
from tessella.processes import Child
from tessella.steps import Step

# The trial takes this many steps. Only the later ones are timed: the first ones start processes and fill caches, and a
# preset may add the adversarial loss after a share of the steps.
TRIAL_STEPS, UNTIMED_STEPS = 16, 8
EVERY = {"max_steps": TRIAL_STEPS, "logging_steps": 1, "eval_steps": TRIAL_STEPS, "save_steps": TRIAL_STEPS}
TRIAL_KEYS = {
    "train-tokenizer": {**EVERY, "warmup_steps": 0},
    "train-prior": {**EVERY, "warmup_steps": 0, "num_sample_images": 0},
}
POLL_SECONDS = 0.05


def seconds_per_step(step: Step, folder: Path, gpus: int) -> float:
    """Time of one optimizer step, measured in a training of TRIAL_STEPS steps.

    Args:
        step: the training.
        folder: folder of the trial, which is removed afterwards.
        gpus: number of GPUs.

    Raises:
        SystemExit: the trial failed or was stopped; what it printed is printed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    keys = {**step.keys, "output_dir": str(folder), **TRIAL_KEYS[step.name]}
    with open(folder / "output.txt", "w+") as output:
        child = Child(replace(step, keys=keys), gpus, output)
        with child.running() as process:
            times: list[float] = []
            while process.poll() is None:
                times += [time.monotonic()] * (steps_logged(folder) - len(times))
                time.sleep(POLL_SECONDS)
            code = child.exit_code(process)
        if code:
            output.seek(0)
            print(output.read(), file=sys.stderr)
    shutil.rmtree(folder)
    if child.stopped_by is not None:  # it may have come too late for the trial, which has ended
        code = code or 128 + child.stopped_by
    if code:
        sys.exit(code)
    return (times[TRIAL_STEPS - 1] - times[UNTIMED_STEPS - 1]) / (TRIAL_STEPS - UNTIMED_STEPS)


def steps_logged(folder: Path) -> int:
    """The last step in the log of a training; 0 if there is none. The last line may still be in writing."""
    path = folder / LOG_NAME
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)
