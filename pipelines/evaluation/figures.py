"""What stands beside a figure: number of images, what they were compared with, and its standard error. The table."""

from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.evaluation.confidence import share_error
from pipelines.evaluation.config import EvaluationConfig

GENERATED, TRAINING, AS_MANY, VALIDATION = "generated", "training", "equally many training", "validation"

# The images that each figure is about, and those that they are compared with. Others compare generated images with
# validation images.
ABOUT = {
    "class_accuracy": (GENERATED, TRAINING),
    "class_accuracy_real": (VALIDATION, TRAINING),
    "classification_accuracy_score": (VALIDATION, GENERATED),
    "classification_accuracy_score_real": (VALIDATION, AS_MANY),
    "frechet_distance": (GENERATED, VALIDATION),
    "frechet_distance_real": (TRAINING, VALIDATION),
    "nearest_neighbour_ratio": (GENERATED, TRAINING),
    "suspected_copies": (GENERATED, TRAINING),
    "suspected_copies_chance": (GENERATED, TRAINING),
    "nearer_than_held_out": (GENERATED, TRAINING),
    "codebook_usage": (TRAINING, None),
    "reconstruction_l1": (VALIDATION, None),
    "psnr": (VALIDATION, None),
    "ssim": (VALIDATION, None),
}
# The settings that determine the figures of given images.
SETTINGS = ("classifier", "feature_size", "num_components")


def details(
    figures: Mapping[str, float], counts: Mapping[str, int], errors: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """What stands beside each figure.

    Args:
        figures: by their names.
        counts: number of generated, training and validation images.
        errors: standard errors of figures. Those of accuracies are added.

    Returns:
        For each figure `n`, the number of `images`; `reference`, what they were compared with; and, where it is known,
        `standard_error`.
    """
    counts = {**counts, AS_MANY: min(counts[GENERATED], counts[TRAINING])}
    found = {}
    for name, value in figures.items():
        images, reference = about(name)
        beside: dict[str, Any] = {"n": counts[images], "images": images}
        if reference is not None:
            beside["reference"] = f"{counts[reference]:,} {TRAINING if reference == AS_MANY else reference} images"
        if "accuracy" in name:
            beside["standard_error"] = share_error(value, counts[images])
        elif name in errors:
            beside["standard_error"] = errors[name]
        found[name] = beside
    return found


def about(name: str) -> tuple[str, str | None]:
    """The images that a figure is about, and those that they are compared with."""
    if name not in ABOUT and name.startswith("class_accuracy_"):  # of a further condition
        name = "class_accuracy_real" if name.endswith("_real") else "class_accuracy"
    return ABOUT.get(name, (GENERATED, VALIDATION))


def settings_of(config: EvaluationConfig, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that stand beside the figures; `sampling` are those of generated images."""
    named = {**sampling, **{key: getattr(config, key) for key in SETTINGS}}
    given = {"data": config.data.dataset, "validation_split": config.data.validation_split, **named}
    return {key: value for key, value in given.items() if value is not None}


def figure_table(metrics: Mapping[str, Any]) -> str:
    """The figures as a table for a terminal, with what stands beside each, and the settings below."""
    head = ("figure", "value", "±", "n", "images", "compared with")
    rows = [head, *(row(name, metrics[name], beside) for name, beside in metrics["details"].items())]
    widths = [max(len(line[column]) for line in rows) for column in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in rows]
    return "\n".join([*lines, *notes(metrics)])


def row(name: str, value: float, beside: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a figure, in the order of the table's head."""
    error = beside.get("standard_error")
    spread = "" if error is None else f"{error:.2g}"
    return name, f"{value:.4g}", spread, f"{beside['n']:,}", beside["images"], beside.get("reference", "")


def notes(metrics: Mapping[str, Any]) -> Iterable[str]:
    """The lines below the table."""
    yield "settings: " + ", ".join(f"{key} {value}" for key, value in metrics["settings"].items())
    left_out = metrics.get("left_out", {})
    for reason in dict.fromkeys(left_out.values()):
        yield f"left out: {', '.join(name for name in left_out if left_out[name] == reason)} ({reason})"
    if "skipped" in metrics:
        yield f"{metrics['skipped']:,} real images could not be decoded"
    yield "seconds: " + ", ".join(f"{step} {seconds:g}" for step, seconds in metrics["seconds"].items())
