"""The files for `accelerate launch --config_file` have the effect in accelerate that they describe."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
KINDS = {
    "one_gpu": ("NO", 1),
    "multi_gpu": ("MULTI_GPU", 8),
    "multi_node": ("MULTI_GPU", 16),
    "fsdp": ("FSDP", 8),
}


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_intended_settings(name):
    kind, num_processes = KINDS[name]
    path = str(FOLDER / f"{name}.yaml")
    config = load_config_from_file(path)
    assert (config.distributed_type.value, config.num_processes) == (kind, num_processes)
    assert config.mixed_precision == "no"  # the configuration of the stage sets the precision
    arguments = launch_command_parser().parse_args(["--config_file", path, "-m", "stage2_prior.train"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == num_processes and arguments.mixed_precision == "no"
    assert (arguments.use_fsdp, arguments.use_deepspeed) == (kind == "FSDP", False)
    if kind == "FSDP":
        assert (int(arguments.fsdp_version), arguments.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
