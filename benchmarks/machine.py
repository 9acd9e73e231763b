"""The machine of a measurement: versions, commit, date and processor, and its measured peak performance."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measuring import interleaved

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "lpips",
    "diffusers",
    "vector-quantize-pytorch",
    "monai",
    "taming-transformers-rom1504",
)


@dataclass(frozen=True)
class Ceilings:
    """Peak performance, the best of a few runs on random numbers. It limits the speed of all work on this machine.

    Attributes:
        matmul: floating-point operations per second of a large matrix product.
        conv: floating-point operations per second of a 3×3 convolution of 128 channels, channels-last.
        copy: bytes per second of a large copy; bytes read and bytes written both count.
    """

    matmul: float
    conv: float
    copy: float

    def seconds(self, operations: float, traffic: float = 0.0) -> float:
        """The shortest possible seconds for a number of operations and a number of bytes."""
        return max(operations / self.matmul, traffic / self.copy)

    def as_json(self) -> dict[str, float]:
        """The values in units of 10⁹, rounded."""
        return {f"{name}_g": round(value / 1e9, 1) for name, value in asdict(self).items()}


@torch.no_grad()
def ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 7) -> Ceilings:
    """Measures the ceilings in about a second, with the current number of threads."""
    is_gpu = device.type != "cpu"
    side, batch, size = (8192, 64, 128) if is_gpu else (1024, 4, 32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    image = torch.randn(batch, 128, size, size, device=device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    kernel = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    source = torch.randn(2**30 if is_gpu else 2**25, device=device)
    target = torch.empty_like(source)
    lanes = {
        "matmul": lambda: a @ b,
        "conv": lambda: F.conv2d(image, kernel, padding=1),
        "copy": lambda: target.copy_(source),
    }
    least = {name: min(times.wall) for name, times in interleaved(lanes, rounds, 2, device).items()}
    return Ceilings(
        matmul=2 * side**3 / least["matmul"],
        conv=2 * 9 * 128**2 * batch * size**2 / least["conv"],
        copy=2 * source.nbytes / least["copy"],
    )


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside this context, float32 computes without TF32, the default of convolutions on a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions, commit and machine of a measurement, and the load of the machine."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else None
    changed = [line for line in (_git("status", "--porcelain") or "").splitlines() if "benchmarks/results/" not in line]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed),
        "python": platform.python_version(),
        "versions": versions,
        "gpu": gpu,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
