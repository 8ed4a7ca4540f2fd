"""A line chart as SVG: static, so that a page needs no library; the browser shows each point's
numbers when it is pointed at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetuning.html_page import text

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 480, 240, 56, 24, 10, 10
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
MAX_POINTS = 400  # of a line; a long run's are thinned out
TICKS = 4


@dataclass(frozen=True)
class Line:
    """A curve."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str
    is_dashed: bool = False
    marked_step: float | None = None
    """a step that is marked with a star: whose weights were kept"""

    def points(self) -> list[tuple[float, float]]:
        """The finite ones, at most MAX_POINTS, the first and the last among them."""
        pairs = zip(self.steps, self.values, strict=True)
        finite = [(step, value) for step, value in pairs if math.isfinite(value)]
        every = max(1, math.ceil(len(finite) / MAX_POINTS))
        thinned = finite[::every]
        return thinned if not finite or thinned[-1] == finite[-1] else [*thinned, finite[-1]]


def chart(lines: Sequence[Line]) -> Markup | None:
    """An <svg> of the lines; None where none has a point."""
    drawn = [(line, points) for line in lines if (points := line.points())]
    if not drawn:
        return None
    steps = [step for _, points in drawn for step, _ in points]
    values = [value for _, points in drawn for _, value in points]
    scale = Scale(min(steps), max(steps), min(values), max(values))
    parts = [scale.axes(), *(curve(line, points, scale) for line, points in drawn)]
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(
        WIDTH, HEIGHT, Markup("").join(parts)
    )


@dataclass(frozen=True)
class Scale:
    """From steps and values to places in the picture."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        share = (step - self.first) / ((self.last - self.first) or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

    def axes(self) -> Markup:
        """Lines at round distances, with their values and the first and last step."""
        parts = []
        for number in range(TICKS + 1):
            value = self.low + (self.high - self.low) * number / TICKS
            parts.append(
                Markup(
                    '<path d="M{left} {y}H{right}" stroke="#8884" fill="none"/>'
                    '<text x="{place}" y="{below}" text-anchor="end">{value}</text>'
                ).format(
                    left=LEFT,
                    right=WIDTH - RIGHT,
                    y=self.y(value),
                    place=LEFT - 4,
                    below=self.y(value) + 4,
                    value=f"{value:.3g}",
                )
            )
        for step, anchor in ((self.first, "start"), (self.last, "end")):
            parts.append(
                Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
                    self.x(step), HEIGHT - 6, anchor, f"{step:,.0f}"
                )
            )
        return Markup("").join(parts)


def curve(line: Line, points: Sequence[tuple[float, float]], scale: Scale) -> Markup:
    places = " ".join(f"{scale.x(step)},{scale.y(value)}" for step, value in points)
    parts = [
        Markup(
            '<polyline points="{}" fill="none" stroke="{}" stroke-width="1.5"'
            ' stroke-dasharray="{}"/>'
        ).format(places, line.colour, "5 3" if line.is_dashed else "none")
    ]
    for step, value in points:
        is_marked = step == line.marked_step
        parts.append(
            Markup('<circle cx="{}" cy="{}" r="{}" fill="{}"><title>{}</title></circle>').format(
                scale.x(step),
                scale.y(value),
                6 if is_marked else 2,
                line.colour,
                text(f"{line.name}, {step:,.0f}: {value:.6g}{' (kept)' if is_marked else ''}"),
            )
        )
    return Markup("").join(parts)
