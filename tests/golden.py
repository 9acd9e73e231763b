"""Compares our results with stored results of the original code; `python -m tests.golden` prints a table."""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
# Processors sum in different orders. Each layer may have an error of four units in the last place of its largest
# output, 2^-22. The errors of all layers may add up.
ROUNDING_OF_A_LAYER = 2.0**-22
# For losses and the discriminator: 2e-6 for 5 convolutions and 4 normalisations, times 5 as a margin. A fault exceeds
# the bound: twice the ε of BatchNorm gives an error of at least 1.1e-5, a slope of 0.201 instead of 0.2 gives 1e-3.
OUTPUTS = 1e-5
GRADIENTS = 1e-4  # relative to the norm


class Found(NamedTuple):
    """The difference of one quantity of one case from its stored value."""

    quantity: str
    case: str
    error: float
    bound: float


def state(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without the prefix in their names."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def elementwise(found: Tensor, expected: Tensor) -> float:
    """The largest difference of an element, relative to the largest expected element if that exceeds 1."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)).item()


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, divided by the norm of the expected tensor."""
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    rows: dict[str, list[Found]] = {}
    for module in ("tests.golden_models", "tests.golden_losses", "tests.golden_priors"):
        for found in import_module(module).compare():
            rows.setdefault(found.quantity, []).append(found)
    print(f"{'quantity':<40}{'cases':>6}{'max error':>12}{'bound':>9}  worst case")
    for quantity, founds in rows.items():
        worst = max(founds, key=lambda found: found.error)
        print(f"{quantity:<40}{len(founds):>6}{worst.error:>12.1e}{worst.bound:>9.0e}  {worst.case}")


if __name__ == "__main__":
    main()
