"""Precision, recall, density and coverage of generated images, from features.

Around the features of each image lies a ball that reaches to its k-th nearest neighbour in the same set. The balls of a
set together estimate where images of its kind lie.

Shape letters: N reference images, M generated images, D features of an image.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PRECISION_K, DENSITY_K = 3, 5  # neighbours that set the radius: of precision and recall, of density and coverage
BLOCK = 4096  # rows whose distances are computed at once: float64 of 4096 × 4096 takes 134 MB


def overlap(reference: Tensor, generated: Tensor, device: torch.device | str = "cpu") -> dict[str, float]:
    """How two sets overlap. Distances are float64; memory does not grow with N · M.

    Args:
        reference: features of real images, `(N, D)`, N > 5.
        generated: features of generated images, `(M, D)`, M > 5.
        device: where distances are computed. MPS has no float64, so there it is the CPU.

    Returns:
        `precision`: share of generated images inside the ball of a real image; k = 3.
        `recall`: share of real images inside the ball of a generated image; k = 3.
        `density`: mean number of real images' balls around a generated image, divided by k = 5; can exceed 1.
        `coverage`: share of real images whose ball holds a generated image; k = 5.

    Source: Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models"; Naeem et
        al. 2020, "Reliable fidelity and diversity metrics for generative models". As in their code, a border belongs to
        a ball of precision and recall, and does not belong to a ball of density and coverage.
    """
    device = "cpu" if torch.device(device).type == "mps" else device
    real, real_wide = radii(reference, device).unbind(1)
    made = radii(generated, device)[:, 0]
    precise, around = torch.zeros(len(made), dtype=torch.bool, device=device), torch.zeros_like(made)
    recalled, nearest = torch.zeros(len(real), dtype=torch.bool, device=device), torch.full_like(real, torch.inf)
    for rows, of_real in blocks(reference, device):
        for columns, of_made in blocks(generated, device):
            distances = torch.cdist(of_real, of_made)
            precise[columns] |= (distances <= real[rows, None]).any(0)
            recalled[rows] |= (distances <= made[columns]).any(1)
            around[columns] += (distances < real_wide[rows, None]).sum(0)
            nearest[rows] = nearest[rows].minimum(distances.amin(1))
    shares = {"precision": precise, "recall": recalled, "density": around / DENSITY_K, "coverage": nearest < real_wide}
    return {name: values.double().mean().item() for name, values in shares.items()}


def radii(features: Tensor, device: torch.device | str) -> Tensor:
    """Distances of each row `(N, D)` to its 3rd and to its 5th nearest other row, float64 `(N, 2)`."""
    found = []
    for _, rows in blocks(features, device):
        nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        for _, others in blocks(features, device):
            known = torch.cat([nearest, torch.cdist(rows, others)], 1)
            nearest = known.topk(min(DENSITY_K + 1, known.shape[1]), largest=False).values  # the first one is itself
        found.append(nearest[:, [PRECISION_K, DENSITY_K]])
    return torch.cat(found)


def blocks(features: Tensor, device: torch.device | str) -> Iterator[tuple[slice, Tensor]]:
    """The rows in blocks, float64 on the device, and where each block stands."""
    for first in range(0, len(features), BLOCK):
        rows = slice(first, min(first + BLOCK, len(features)))
        yield rows, features[rows].to(device, torch.float64)
