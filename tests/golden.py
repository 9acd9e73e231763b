"""Compares our numbers with stored numbers of the original code; `python -m tests.golden` prints a table."""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
# Processors add in different orders. Allow each layer four units in the last place of its largest output, 2^-22. The
# errors of all layers may point the same way.
ROUNDING_OF_A_LAYER = 2.0**-22
# Losses, and the discriminator: its 5 convolutions and 4 normalisations make 2e-6, times 5 as a margin. Twice the ε of
# BatchNorm leaves 1.1e-5 or more; a slope of 0.201 instead of 0.2 leaves 1e-3.
OUTPUTS = 1e-5
GRADIENTS = 1e-4  # relative to the norm


class Found(NamedTuple):
    """How far one quantity of one case is from the stored one."""

    quantity: str
    case: str
    error: float
    bound: float


def state(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def elementwise(found: Tensor, expected: Tensor) -> float:
    """The largest difference of an element; relative to the largest expected element where that is above 1."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)).item()


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    rows: dict[str, list[Found]] = {}
    for module in ("tests.golden_models", "tests.golden_losses"):
        for found in import_module(module).compare():
            rows.setdefault(found.quantity, []).append(found)
    print(f"{'quantity':<40}{'cases':>6}{'max error':>12}{'bound':>9}  worst case")
    for quantity, founds in rows.items():
        worst = max(founds, key=lambda found: found.error)
        print(f"{quantity:<40}{len(founds):>6}{worst.error:>12.1e}{worst.bound:>9.0e}  {worst.case}")


if __name__ == "__main__":
    main()
