"""The coloured things that the demo model can draw, as vector pictures. Knows no prompts.

Each thing is drawn in a square that reaches from -1 to 1 on both axes, y downwards, and is one connected piece, so that
things can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import cos, pi, radians, sin

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, RGB] = {
    "red": (224, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 215, 40),
    "orange": (245, 135, 25),
    "purple": (135, 50, 180),
    "pink": (250, 140, 190),
    "cyan": (50, 205, 220),
    "brown": (130, 80, 40),
    "black": (22, 22, 26),
    "white": (250, 250, 250),
    "gray": (135, 138, 142),
}

LEAF, BARK, GOLD = (50, 140, 50), (120, 75, 35), (250, 200, 40)


def blend(one: RGB, other: RGB, share: float) -> RGB:
    """`one`, with `share` of `other` in it."""
    return (_blend(one[0], other[0], share), _blend(one[1], other[1], share), _blend(one[2], other[2], share))


def _blend(one: int, other: int, share: float) -> int:
    return round(one + (other - one) * share)


def brightness(colour: RGB) -> float:
    """0 to 255, weighted as eyes do (ITU-R BT.601, to one digit)."""
    return 0.3 * colour[0] + 0.6 * colour[1] + 0.1 * colour[2]


@dataclass(frozen=True)
class Brush:
    """Draws into the square of edge 2 * `radius` pixels around (`x`, `y`)."""

    on: ImageDraw.ImageDraw
    x: float
    y: float
    radius: float
    colour: RGB
    behind: RGB
    """what shows through holes"""

    def at(self, points: Iterable[Point]) -> list[Point]:
        return [(self.x + u * self.radius, self.y + v * self.radius) for u, v in points]

    def polygon(self, *points: Point, fill: RGB | None = None) -> None:
        self.on.polygon(self.at(points), fill=fill or self.colour)

    def box(self, left: float, top: float, right: float, bottom: float, fill: RGB | None = None) -> None:
        self.on.rectangle(self.at([(left, top), (right, bottom)]), fill=fill or self.colour)

    def oval(self, u: float, v: float, width: float, height: float | None = None, fill: RGB | None = None) -> None:
        """Around (u, v), with these half axes."""
        height = width if height is None else height
        corners = self.at([(u - width, v - height), (u + width, v + height)])
        self.on.ellipse(corners, fill=fill or self.colour)

    def line(self, *points: Point, width: float, fill: RGB) -> None:
        self.on.line(self.at(points), fill=fill, width=max(1, int(width * self.radius)))

    def choose(self, limit: float, above: RGB, below: RGB) -> RGB:
        """A detail's colour that is seen on the thing's own."""
        return above if brightness(self.colour) > limit else below


def regular(corners: int, radius: float, turn: float, centre: Point = (0, 0)) -> list[Point]:
    """The corners of a regular polygon, the first one `turn` degrees from the right, clockwise."""
    angles = [radians(turn + 360 * i / corners) for i in range(corners)]
    return [(centre[0] + radius * cos(a), centre[1] + radius * sin(a)) for a in angles]


def circle(brush: Brush) -> None:
    brush.oval(0, 0, 0.95)


def square(brush: Brush) -> None:
    brush.box(-0.85, -0.85, 0.85, 0.85)


def triangle(brush: Brush) -> None:
    brush.polygon((0, -0.9), (0.98, 0.8), (-0.98, 0.8))


def star(brush: Brush) -> None:
    outer, inner = regular(5, 1.02, -90, (0, 0.06)), regular(5, 0.43, -54, (0, 0.06))
    brush.polygon(*(corner for pair in zip(outer, inner, strict=True) for corner in pair))


def heart(brush: Brush) -> None:
    """The well-known curve of 16 sin^3 t against four cosines."""
    turns = [2 * pi * i / 60 for i in range(60)]
    rises = [13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t) for t in turns]
    brush.polygon(*((0.97 * sin(t) ** 3, -(rise + 2.5) / 16) for t, rise in zip(turns, rises, strict=True)))


def diamond(brush: Brush) -> None:
    brush.polygon((0, -1), (0.72, 0), (0, 1), (-0.72, 0))


def ring(brush: Brush) -> None:
    brush.oval(0, 0, 0.95)
    brush.oval(0, 0, 0.55, fill=brush.behind)


def cross(brush: Brush) -> None:
    brush.box(-0.32, -0.95, 0.32, 0.95)
    brush.box(-0.95, -0.32, 0.95, 0.32)


def hexagon(brush: Brush) -> None:
    brush.polygon(*regular(6, 0.98, 0))


def moon(brush: Brush) -> None:
    brush.oval(-0.05, 0, 0.92)
    brush.oval(0.38, -0.12, 0.76, fill=brush.behind)


def house(brush: Brush) -> None:
    roof = brush.choose(60, above=blend(brush.colour, (0, 0, 0), 0.4), below=(90, 90, 96))
    window = brush.choose(200, above=(110, 170, 230), below=(255, 240, 150))
    brush.box(-0.68, -0.1, 0.68, 0.9)
    brush.polygon((-0.95, -0.1), (0, -0.95), (0.95, -0.1), fill=roof)
    brush.box(-0.16, 0.35, 0.16, 0.9, fill=brush.choose(120, above=(110, 70, 35), below=(235, 220, 180)))
    for left in (-0.52, 0.24):
        brush.box(left, 0.1, left + 0.28, 0.4, fill=window)


def tree(brush: Brush) -> None:
    brush.box(-0.14, 0.2, 0.14, 0.95, fill=BARK)
    for u, v, width, height in ((0, -0.5, 0.5, 0.45), (-0.38, -0.1, 0.48, 0.42), (0.38, -0.1, 0.48, 0.42)):
        brush.oval(u, v, width, height)
    brush.oval(0, 0, 0.4, 0.36)


def flower(brush: Brush) -> None:
    leaf = (15, 75, 25) if _distance(brush.behind, LEAF) < 90 else LEAF
    brush.box(-0.08, 0.1, 0.08, 0.98, fill=leaf)
    brush.polygon((0, 0.85), (0.5, 0.42), (0.4, 0.8), fill=leaf)
    for u, v in regular(6, 0.4, 0, (0, -0.28)):
        brush.oval(u, v, 0.26)
    brush.oval(0, -0.28, 0.22, fill=(160, 90, 30) if _distance(brush.colour, GOLD) < 60 else GOLD)


def _distance(one: RGB, other: RGB) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def cat(brush: Brush) -> None:
    dark = brush.choose(70, above=(20, 20, 20), below=(240, 230, 120))
    nose = (150, 60, 80) if brush.colour[0] >= 200 and brightness(brush.colour) >= 150 else (250, 130, 150)
    for side in (-1, 1):
        brush.polygon((side * 0.82, -0.95), (side * 0.2, -0.6), (side * 0.75, -0.05))
    brush.oval(0, 0.12, 0.85, 0.78)
    brush.polygon((-0.12, 0.3), (0.12, 0.3), (0, 0.45), fill=nose)
    for side in (-1, 1):
        brush.oval(side * 0.34, 0, 0.13, 0.18, fill=dark)
        brush.line((side * 0.3, 0.42), (side * 0.95, 0.34), width=0.05, fill=dark)
        brush.line((side * 0.3, 0.52), (side * 0.95, 0.6), width=0.05, fill=dark)


def fish(brush: Brush) -> None:
    tail = brush.choose(60, above=blend(brush.colour, (0, 0, 0), 0.25), below=(80, 80, 86))
    brush.polygon((0.35, 0), (0.98, -0.5), (0.98, 0.5), fill=tail)
    brush.oval(-0.2, 0, 0.75, 0.48)
    brush.oval(-0.55, -0.1, 0.11, fill=brush.choose(200, above=(120, 120, 120), below=(255, 255, 255)))
    brush.oval(-0.57, -0.1, 0.05, fill=(0, 0, 0))


def car(brush: Brush) -> None:
    glass = brush.choose(200, above=(70, 100, 140), below=(190, 225, 245))
    tyre = (35, 35, 38) if brightness(brush.behind) > 60 else (95, 95, 100)
    brush.polygon((-0.55, -0.05), (-0.35, -0.5), (0.35, -0.5), (0.6, -0.05))
    brush.box(-0.97, -0.08, 0.97, 0.38)
    brush.polygon((-0.42, -0.07), (-0.28, -0.4), (-0.04, -0.4), (-0.04, -0.07), fill=glass)
    brush.polygon((0.04, -0.07), (0.04, -0.4), (0.28, -0.4), (0.44, -0.07), fill=glass)
    for u in (-0.52, 0.52):
        brush.oval(u, 0.4, 0.24, fill=tyre)
        brush.oval(u, 0.4, 0.1, fill=(200, 200, 205))


def sun(brush: Brush) -> None:
    """Its rays are wide and blunt, to be seen in a picture of 96 pixels with five suns."""
    for i in range(8):
        middle, foot, tip = radians(45 * i), radians(17), radians(8)
        feet = ((0.46 * cos(middle + turn), 0.46 * sin(middle + turn)) for turn in (-foot, foot))
        brush.polygon(*((cos(middle + turn), sin(middle + turn)) for turn in (tip, -tip)), *feet)
    brush.oval(0, 0, 0.5)


def cloud(brush: Brush) -> None:
    for u, v, width, height in ((-0.5, 0.15, 0.45, 0.38), (0.5, 0.15, 0.45, 0.38), (-0.1, -0.18, 0.5, 0.45)):
        brush.oval(u, v, width, height)
    brush.oval(0.25, 0, 0.45, 0.4)
    brush.box(-0.5, 0.15, 0.5, 0.53)


def face(brush: Brush) -> None:
    dark = brush.choose(70, above=(25, 25, 25), below=(240, 240, 240))
    brush.oval(0, 0, 0.95)
    for u in (-0.33, 0.33):
        brush.oval(u, -0.25, 0.15, 0.21, fill=dark)
    mouth = brush.at([(-0.55, -0.5), (0.55, 0.6)])
    brush.on.arc([*mouth[0], *mouth[1]], 20, 160, fill=dark, width=max(1, int(0.2 * brush.radius)))


def mushroom(brush: Brush) -> None:
    stem = (240, 225, 195) if brightness(brush.behind) < 215 else (215, 190, 150)
    spots = brush.choose(215, above=(220, 60, 60), below=(255, 255, 255))
    brush.box(-0.24, 0, 0.24, 0.92, fill=stem)
    cap = brush.at([(-0.95, -0.92), (0.95, 0.98)])
    brush.on.pieslice([*cap[0], *cap[1]], 180, 360, fill=brush.colour)
    for u, v, radius in ((0, -0.6, 0.15), (-0.5, -0.25, 0.13), (0.5, -0.25, 0.13), (0.05, -0.15, 0.1)):
        brush.oval(u, v, radius, fill=spots)


SHAPES: dict[str, Callable[[Brush], None]] = {
    shape.__name__: shape
    for shape in (
        *(circle, square, triangle, star, heart, diamond, ring, cross, hexagon, moon),
        *(house, tree, flower, cat, fish, car, sun, cloud, face, mushroom),
    )
}

SUPERSAMPLING = 2
"""pixels drawn for each pixel that stays, along each axis: edges are smooth"""


@dataclass(frozen=True)
class Canvas:
    """A picture of `width` x `height` pixels, drawn larger by SUPERSAMPLING. Positions are fractions of it."""

    width: int
    height: int
    large: Image.Image

    @classmethod
    def blank(cls, width: int, height: int, colour: RGB = (0, 0, 0)) -> Canvas:
        return cls(width, height, Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), colour))

    @property
    def edge(self) -> int:
        """The shorter one, in pixels of the large picture. Sizes of things are fractions of it."""
        return min(self.large.size)

    def fade(self, top: RGB, bottom: RGB) -> None:
        """Cover everything with a gradient from top to bottom."""
        rows = self.large.height
        column = Image.new("RGB", (1, rows))
        column.putdata([blend(top, bottom, y / (rows - 1)) for y in range(rows)])
        self.large.paste(column.resize(self.large.size))

    def draw(self, shape: str, x: float, y: float, size: float, colour: RGB, behind: RGB | None = None) -> None:
        """`size`: the edge of the thing's square. `behind` is read from the left edge where it is not given."""
        column, row = x * self.large.width, y * self.large.height
        if behind is None:
            red, green, blue = self.large.getpixel((0, int(row)))  # type: ignore[misc]  # RGB has three numbers
            behind = (red, green, blue)
        SHAPES[shape](Brush(ImageDraw.Draw(self.large), column, row, size * self.edge / 2, colour, behind))

    def picture(self) -> Image.Image:
        return self.large.reduce(SUPERSAMPLING)
