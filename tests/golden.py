"""Numbers that the originals made, and how far ours are from them; `python -m tests.golden` prints a table."""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
OUTPUTS, GRADIENTS = 1e-5, 1e-4  # bounds: absolute, and relative to the norm


class Found(NamedTuple):
    """How far one quantity of one case is from the stored one."""

    quantity: str
    case: str
    error: float
    bound: float


def state(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def absolute(found: Tensor, expected: Tensor) -> float:
    """Largest difference of an element."""
    assert found.shape == expected.shape
    return (found.double() - expected.double()).abs().max().item()


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
