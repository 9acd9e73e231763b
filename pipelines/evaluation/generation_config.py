"""Settings of the metrics that compare generated images with real ones in the features of networks."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from configs import Section
from stage1_vqgan.evaluation.config import INCEPTION
from stage1_vqgan.networks.names import name_problems

DINOV2 = "dinov2"
OWN_PROTOCOL = (INCEPTION, DINOV2)  # networks with a published protocol, which says how images are prepared


@dataclass(kw_only=True)
class GenerationMetricsConfig(Section):
    """Metrics that compare generated images with real ones in the features of networks.

    feature_networks: each network gives its own distances, precision, recall, density and coverage:
        "efficientnet-lite0" (needs no download), "inception" (FID, sFID and the Inception score), "dinov2" (the Frechet
        distance with DINOv2), "torchvision/NAME", "timm/NAME", "transformers/FOLDER_OR_HUB_ID"; [] measures none of
        them
    """

    feature_networks: list[str] = field(default_factory=lambda: ["efficientnet-lite0"])

    def problems(self) -> Iterable[tuple[str, Any, str]]:
        for name in self.feature_networks:
            for key, value, allowed in name_problems("feature_networks", name) if name not in OWN_PROTOCOL else ():
                yield key, value, f"{allowed}; or {INCEPTION}, for FID; or {DINOV2}"
