"""A picture of a run's losses, drawn from its metrics.jsonl."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 420, 300  # pixels of a panel
LEFT, TOP, RIGHT, BOTTOM = 56, 48, 14, 34  # margins around the axes
SHARP = 2  # drawn this many times larger, then reduced: smooth lines
COLOURS = {"training": "#1f77b4", "validation": "#d62728"}
GRAY = "#888888"

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One diagram: a title, and the curves in it as `{key in metrics.jsonl: "training" or "validation"}`."""

    title: str
    curves: dict[str, str]


def draw_curves(log: Path, panels: list[Panel]) -> Image.Image | None:
    """Draws the panels that have at least one curve of two points, side by side; None if there is none.

    Raises:
        FileNotFoundError: there is no log.
    """
    read = {key: _points(log, key) for panel in panels for key in panel.curves}
    drawn = [
        (panel.title, curves)
        for panel in panels
        if (curves := {name: read[key] for key, name in panel.curves.items() if len(read[key]) > 1})
    ]
    if not drawn:
        return None
    picture = Image.new("RGB", (WIDTH * len(drawn) * SHARP, HEIGHT * SHARP), "white")
    for index, (title, curves) in enumerate(drawn):
        _Axes(ImageDraw.Draw(picture), index * WIDTH, curves).draw(title)
    return picture.resize((WIDTH * len(drawn), HEIGHT), Image.Resampling.LANCZOS)


def _points(log: Path, key: str) -> Points:
    """`(step, value)` of the lines that have the key."""
    points = []
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # a crash may have cut the last line off
            values = json.loads(line)
            point = float(values["step"]), float(values[key])
            if math.isfinite(point[1]):
                points.append(point)
    return points


class _Axes:
    """Draws one panel. Positions are pixels of the finished picture."""

    def __init__(self, draw: Any, left: int, curves: dict[str, Points]):
        self.pen, self.curves = draw, curves
        self.box = left + LEFT, TOP, left + WIDTH - RIGHT, HEIGHT - BOTTOM
        steps = [x for points in curves.values() for x, _ in points]
        values = [y for points in curves.values() for _, y in points]
        self.x, self.y = (min(steps), max(steps)), (min(values), max(values))

    def draw(self, title: str) -> None:
        left, _, right, bottom = self.box
        self._text((left, 6), title, "la", 15, "black")
        for value in ticks(*self.y):
            _, y = self._place(self.x[0], value)
            self._line([(left, y), (right, y)], "#e4e4e4", 1)
            self._text((left - 6, y), f"{value:.4g}", "rm", 11, GRAY)
        for step in ticks(*self.x):
            x, _ = self._place(step, self.y[0])
            self._text((x, bottom + 6), f"{step:,.0f}", "ma", 11, GRAY)
        self._line([(left, bottom), (right, bottom)], GRAY, 1)
        position = left
        for name, points in self.curves.items():
            colour = COLOURS[name]
            self._line([self._place(*point) for point in points], colour, 2)
            self._text((position, 27), name, "la", 12, colour)
            position += 12 + 7 * len(name)
        self._text((right, HEIGHT - 4), "optimizer steps", "rd", 11, GRAY)

    def _place(self, step: float, value: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        across = (step - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return left + across * (right - left), bottom - up * (bottom - top)

    def _line(self, points: Points, colour: str, width: int) -> None:
        self.pen.line([(x * SHARP, y * SHARP) for x, y in points], colour, width * SHARP, joint="curve")

    def _text(self, place: tuple[float, float], text: str, anchor: str, size: int, colour: str) -> None:
        font = ImageFont.load_default(size * SHARP)
        self.pen.text((place[0] * SHARP, place[1] * SHARP), text, colour, font, anchor=anchor)


def ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers from low to high: two to five."""
    if high <= low:
        yield low
        return
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield index * step
