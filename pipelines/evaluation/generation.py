"""Metrics of generated images in the features of networks: Frechet distances, KID, Inception score, precision and more.

Each figure carries the name of its network, but for those of Inception that have names of their own: fid, sfid and
inception_score.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from configs import ConfigError, Problem
from configs.checksums import CHECKED_SUFFIXES, checksum
from configs.problems import one_line
from pipelines.evaluation.dinov2 import load_dinov2
from pipelines.evaluation.features import LOGITS, POOLED, SPATIAL, features_of
from pipelines.evaluation.generation_config import DINOV2, GenerationMetricsConfig
from pipelines.evaluation.image_set import ImageSet
from pipelines.evaluation.manifolds import overlap
from stage1_vqgan.evaluation.config import INCEPTION
from stage1_vqgan.evaluation.frechet import Gaussian, Moments, fitted, frechet_distance
from stage1_vqgan.evaluation.inception import load_inception
from stage1_vqgan.evaluation.networks import ADVICE_OF_A_LOSS
from stage1_vqgan.networks import FrozenNetwork, load_network
from stage1_vqgan.networks.names import split_name
from stage1_vqgan.networks.weights import package

LIBRARIES = ("torch_fidelity.metric_kid", "torch_fidelity.metric_isc")
SPLITS = 10  # of the Inception score, which is the mean over them
FEWEST = SPLITS  # images of a set; the balls of precision and density need more than five
KID_SUBSETS, KID_SUBSET = 100, 1000  # KID is the mean over so many subsets of so many images
SEED = 2020  # torch-fidelity's own, of the subsets and of the splits
ROWS = 4096  # features that are in memory at once
# The end of a reason that may have gone at the next run; reasons that lie in the images stay.
AGAIN = "; the next run tries again"
OVERLAP = ("precision", "recall", "density", "coverage")


def generation_metrics(
    config: GenerationMetricsConfig, reference: ImageSet, generated: ImageSet, accelerator: Accelerator, folder: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """Compares generated images with real ones in the features of each network. All processes must call this.

    Figures follow from the images as PNG files would hold them. A figure is left out if its network cannot be had on
    this machine, or if the images are too few or too small for it.

    Args:
        config: names of the networks.
        reference: real images.
        generated: generated images.
        accelerator: the processes; each computes features of a share of the images.
        folder: of the files with features. After an interruption, a call with the same folder goes on.

    Returns:
        The figures by their names; and for each figure that is left out, why.

    Raises:
        ConfigError: there is no network of that name.
        DiskFull: the message names the file.
    """
    figures, left_out = dict[str, float](), dict[str, str]()
    sets = {"reference": reference, "generated": generated}
    for name in dict.fromkeys(config.feature_networks):
        network, reason = usable(name, list(sets.values()), accelerator)
        if network is None:
            left_out |= dict.fromkeys(figures_of(name), reason)
            continue
        files = folder / re.sub(r"[^\w.@-]+", "_", name)[-100:]
        real, made = (features_of(images, network, accelerator, files / role) for role, images in sets.items())
        if accelerator.is_main_process:
            try:
                for found in measured(name, real, made, accelerator.device):
                    figures |= found
            except ImportError as error:
                missing = [figure for figure in figures_of(name) if figure not in figures]
                left_out |= dict.fromkeys(missing, one_line(error, 400) + AGAIN)
    figures, left_out = broadcast_object_list([figures, left_out])
    return figures, left_out


def figures_of(network: str) -> list[str]:
    """The names of the figures that a network gives."""
    shared = [f"{kind}/{network}" for kind in (*OVERLAP, "kid")]
    own = ["fid", "sfid", "inception_score"] if network == INCEPTION else [f"frechet_distance/{network}"]
    return own + shared


def networks_in_folders(config: GenerationMetricsConfig) -> dict[str, str]:
    """A checksum of each network that is a folder here, by its name: another training may have replaced it."""
    found = {}
    for name in config.feature_networks:
        family, model, _ = ("", "", None) if name in (INCEPTION, DINOV2) else split_name(name)
        if family == "transformers" and Path(model).is_dir():
            files = [path for path in Path(model).iterdir() if path.suffix in CHECKED_SUFFIXES]
            found[name] = "".join(checksum(path) for path in sorted(files))
    return found


def obtained(left_out: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Those networks whose figures were left out because something was missing on this machine, and is there now.

    Args:
        left_out: what `generation_metrics` returned.
        names: of the networks.
    """
    reasons = {name: [left_out.get(figure, "") for figure in figures_of(name)] for name in names}
    waiting = [name for name, found in reasons.items() if any(reason.endswith(AGAIN) for reason in found)]
    return [name for name in waiting if _is_here(name)]


def _is_here(name: str) -> bool:
    try:
        loaded(name)
        for library in LIBRARIES:
            package(library, "torch-fidelity")
    except (ImportError, FileNotFoundError, ValueError):
        return False
    return True


def usable(name: str, sets: list[ImageSet], accelerator: Accelerator) -> tuple[FrozenNetwork | None, str]:
    """A network on the device of this process; or None and the reason, if any process cannot use it.

    Raises:
        ConfigError: there is no network of that name, or it takes only images of other channels.
    """
    network, reason = None, ""
    if (fewest := min(map(len, sets))) < FEWEST:
        return None, f"{fewest} images; it needs {FEWEST} in each set"
    with accelerator.local_main_process_first():  # it downloads, and the others find the files
        try:
            network = loaded(name)
            network.require_channels(sets[0].read(range(1)).shape[1])
        except (ImportError, FileNotFoundError) as error:
            reason = one_line(error, 400).partition(ADVICE_OF_A_LOSS)[0] + AGAIN
        except ValueError as error:
            raise ConfigError([Problem("metrics.feature_networks", one_line(error))]) from error
    if network is not None:
        height, width = min((tuple(images.read(range(1)).shape[-2:]) for images in sets), key=min)
        if min(height, width) < network.least_size:
            reason = f"images of {height}×{width} pixels; {name} needs {network.least_size}"
    reason = next(filter(None, gather_object([reason])), "")
    return (None, reason) if reason or network is None else (network.to(accelerator.device), "")


def loaded(name: str) -> FrozenNetwork:
    """The network of a name.

    Raises:
        ImportError, FileNotFoundError, ValueError: see `load_network`.
    """
    own = {INCEPTION: load_inception, DINOV2: load_dinov2}
    return own[name]() if name in own else load_network(name)


def measured(
    network: str, real: dict[str, Tensor], made: dict[str, Tensor], device: torch.device
) -> Iterator[dict[str, float]]:
    """The figures of a network, those that need torch-fidelity last.

    Args:
        network: its name.
        real, made: features of real and of generated images, `(N, D)` by the name of the output.
        device: where sums and distances are computed.

    Raises:
        ImportError: torch-fidelity is missing; the message says how to install it.
    """
    distance = frechet(real[POOLED], made[POOLED], device)
    yield {"fid" if network == INCEPTION else f"frechet_distance/{network}": distance}
    if network == INCEPTION:
        yield {"sfid": frechet(real[SPATIAL], made[SPATIAL], device)}
    shared = overlap(real[POOLED], made[POOLED], device)
    yield {f"{kind}/{network}": shared[kind] for kind in OVERLAP}
    yield {f"kid/{network}": kid(real[POOLED], made[POOLED])}
    if network == INCEPTION:
        yield {"inception_score": inception_score(made[LOGITS])}


def frechet(real: Tensor, made: Tensor, device: torch.device) -> float:
    """The Frechet distance of two sets of features `(N, D)`."""
    return frechet_distance(gaussian(real, device), gaussian(made, device))


def gaussian(features: Tensor, device: torch.device) -> Gaussian:
    """The Gaussian that is fitted to features `(N, D)`."""
    moments = Moments(features.shape[1], device)
    for rows in features.split(ROWS):
        moments.add(rows)
    return fitted(moments.sums)


def kid(real: Tensor, made: Tensor) -> float:
    """KID of two sets of features `(N, D)`, not multiplied by 1,000. Of equal distributions it is near 0, or below.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs". Computed by torch-fidelity.
    """
    library = package(LIBRARIES[0], "torch-fidelity")
    size = min(KID_SUBSET, len(real), len(made))
    subsets = 1 if len(real) == len(made) == size else KID_SUBSETS  # the only subset of all images is all images
    found = library.kid_features_to_metric(
        made, real, kid_subset_size=size, kid_subsets=subsets, rng_seed=SEED, verbose=False
    )
    return found[library.KEY_METRIC_KID_MEAN]


def inception_score(logits: Tensor) -> float:
    """The Inception score of logits `(N, classes)`, in a random order: images that are sorted by class have another.

    Source: Salimans et al. 2016, "Improved techniques for training GANs". Computed by torch-fidelity.
    """
    library = package(LIBRARIES[1], "torch-fidelity")
    return library.isc_features_to_metric(logits, SPLITS, True, SEED)[library.KEY_METRIC_ISC_MEAN]
