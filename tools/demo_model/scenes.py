"""Little landscapes: the hours of a day over hills, mountains, the sea or a desert, often with one thing in front."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from PIL import ImageDraw

from tools.demo_model.shapes import BARK, COLOURS, RGB, Brush, Canvas, blend


@dataclass(frozen=True)
class Hour:
    """What the light of an hour does."""

    sky: tuple[RGB, RGB]
    """at the top, at the horizon"""

    tint: RGB
    shade: float
    """how much of `tint` is in everything on the ground"""

    phrases: tuple[str, ...]

    def light(self, colour: RGB, share: float = 1) -> RGB:
        return blend(colour, self.tint, self.shade * share)


HOURS = {
    "day": Hour(
        ((70, 150, 235), (190, 225, 250)),
        (90, 95, 105),
        0,
        ("under a blue sky", "in the daytime", "by day"),
    ),
    "sunset": Hour(
        ((110, 50, 130), (255, 165, 70)),
        (70, 40, 60),
        0.25,
        ("at sunset", "under an orange sky", "in the evening"),
    ),
    "night": Hour(((8, 10, 40), (40, 50, 105)), (10, 10, 40), 0.62, ("at night", "under the stars", "by night")),
    "gray": Hour(
        ((130, 138, 150), (200, 205, 212)),
        (90, 95, 105),
        0.2,
        ("under a gray sky", "on a cloudy day", "in the fog"),
    ),
}

GROUNDS = {
    "hills": ("green hills", "rolling green hills", "a green meadow"),
    "mountains": ("snowy mountains", "mountains", "a mountain landscape"),
    "sea": ("the sea", "the ocean", "a calm blue sea"),
    "desert": ("a desert", "sand dunes", "a sandy desert"),
}

SUNNY = "on a sunny day"
"""another phrase of the day, which says that the sun is seen"""

BODIES = {
    "sun": (" with a yellow sun", " with the sun in the sky", " with a sun"),
    "moon": (" with a full moon", " with the moon in the sky", " with a moon"),
}

THINGS = {
    **{"house": "red", "tree": "green", "car": "blue", "cat": "orange", "flower": "yellow", "mushroom": "red"},
    "boat": "white",
}
"""what can be in a landscape, with its colour where the prompt does not say; a boat is on the sea, and nothing else"""

PLACES = {None: 0.5, "left": 0.3, "right": 0.7}
"""where a thing stands, as a fraction of the width"""

THING_COLOURS = ("red", "blue", "yellow", "white", "purple", "orange", "pink", "green")


@dataclass(frozen=True)
class Landscape:
    """What is seen in a landscape. `thing`: its colour and its name, which is `boat` on the sea. `place`: its side.

    The prompt says nearly all of it: what it left open, the model would draw halfway between the possible pictures.
    """

    hour: str
    ground: str
    body: str | None
    thing: tuple[str, str] | None
    place: str | None = None


def imagine(random: Random) -> Landscape:
    hour = random.choice(["day", "day", "sunset", "night", "gray"])
    ground = random.choice(list(GROUNDS))
    body = {"day": "sun", "night": "moon"}.get(hour) if random.random() < 0.6 else None
    if random.random() >= 0.75:
        return Landscape(hour, ground, body, None)
    name = "boat" if ground == "sea" else random.choice([name for name in THINGS if name != "boat"])
    own = name == "tree" or random.random() < 0.25
    colour = THINGS[name] if own else random.choice(THING_COLOURS)
    return Landscape(hour, ground, body, (colour, name), random.choice([None, None, "left", "right"]))


def describe(landscape: Landscape, random: Random) -> str:
    ground = random.choice(GROUNDS[landscape.ground])
    sunny = landscape.body == "sun" and random.random() < 0.4
    hour = SUNNY if sunny else random.choice(HOURS[landscape.hour].phrases)
    if landscape.thing is None:
        prompt = random.choice(["{} {}", "a landscape with {} {}", "a view of {} {}"]).format(ground, hour)
    else:
        colour, name = landscape.thing
        words = name if colour == THINGS[name] and random.random() < 0.7 else f"{colour} {name}"
        thing = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        if name == "boat":
            thing = random.choice([thing, thing, f"a boat with {colour} sails"])
            forms = ["{thing}{side} on {ground} {hour}", "{thing}{side} sailing on {ground} {hour}"]
        else:
            forms = ["{thing}{side} in front of {ground} {hour}", "{thing}{side} and {ground} {hour}"]
        forms.append("{ground} with {thing}{side} {hour}")
        side = f" on the {landscape.place}" if landscape.place else ""
        prompt = random.choice(forms).format(thing=thing, side=side, ground=ground, hour=hour)
    if landscape.body and (not sunny or random.random() < 0.5):
        prompt += random.choice(BODIES[landscape.body])
    return prompt


def draw(landscape: Landscape, canvas: Canvas, random: Random) -> None:
    hour = HOURS[landscape.hour]
    canvas.fade(*hour.sky)
    horizon = random.uniform(0.56, 0.64)
    _draw_sky(landscape, canvas, horizon)
    GROUND_PAINTERS[landscape.ground](canvas, hour, horizon)
    if landscape.thing:
        colour, name = landscape.thing
        x = PLACES[landscape.place]
        if name == "boat":
            _draw_boat(canvas, hour, x, horizon + (1 - horizon) * 0.25, COLOURS[colour])
        else:
            y = 0.8 - 0.12 * canvas.edge / canvas.large.height
            canvas.draw(name, x, y, 0.4, hour.light(COLOURS[colour], 0.35), behind=(95, 160, 75))


def _draw_sky(landscape: Landscape, canvas: Canvas, horizon: float) -> None:
    edge = canvas.edge
    if landscape.hour == "night":
        stars = Random("the same in every night")
        for _ in range(26):
            x, y = stars.random(), stars.uniform(0, 0.5)
            _disc(canvas, x, y, edge * stars.uniform(0.007, 0.012), (240, 240, 255))
    if landscape.body == "sun":
        canvas.draw("sun", 0.76, 0.2, 0.27, (255, 220, 60))
    elif landscape.body == "moon":
        _disc(canvas, 0.24, 0.2, edge * 0.1, (245, 240, 205))
    if landscape.hour == "sunset":
        _disc(canvas, 0.5, horizon - 0.045 * edge / canvas.large.height, edge * 0.15, (255, 225, 120))
    if landscape.hour == "gray":
        for x, y in ((0.25, 0.17), (0.68, 0.26)):
            canvas.draw("cloud", x, y, 0.34, (235, 238, 242))


def _disc(canvas: Canvas, x: float, y: float, radius: float, colour: RGB) -> None:
    """`radius` in pixels of the large picture."""
    column, row = x * canvas.large.width, y * canvas.large.height
    corners = (column - radius, row - radius, column + radius, row + radius)
    ImageDraw.Draw(canvas.large).ellipse(corners, fill=colour)


def _oval(canvas: Canvas, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
    width, height = canvas.large.size
    corners = (left * width, top * height, right * width, bottom * height)
    ImageDraw.Draw(canvas.large).ellipse(corners, fill=colour)


def _floor(canvas: Canvas, top: float, colour: RGB) -> None:
    """Everything below `top`."""
    width, height = canvas.large.size
    ImageDraw.Draw(canvas.large).rectangle((0, top * height, width, height), fill=colour)


def _draw_hills(canvas: Canvas, hour: Hour, horizon: float) -> None:
    near = hour.light((75, 155, 65))
    _oval(canvas, -0.35, horizon - 0.06, 0.75, 1.5, hour.light((105, 180, 80)))
    _oval(canvas, 0.25, horizon, 1.4, 1.5, near)
    _floor(canvas, 0.82, near)


def _draw_desert(canvas: Canvas, hour: Hour, horizon: float) -> None:
    near = hour.light((215, 175, 105))
    _oval(canvas, -0.4, horizon - 0.04, 0.7, 1.4, hour.light((235, 200, 130)))
    _oval(canvas, 0.3, horizon + 0.05, 1.5, 1.4, near)
    _floor(canvas, 0.85, near)


MOUNTAIN = ((0.0, 0.0), (1.0, 1.0), (-1.0, 1.0))
SNOW = ((0.0, 0.0), (0.3, 0.3), (0.1, 0.22), (0.0, 0.33), (-0.1, 0.22), (-0.3, 0.3))
"""corners: how far out, of half the width; how far down, of the height"""


def _draw_mountains(canvas: Canvas, hour: Hour, horizon: float) -> None:
    pen = ImageDraw.Draw(canvas.large)
    width, height = canvas.large.size
    foot = horizon + 0.12
    for x, tall, wide, darker in ((0.24, 0.31, 0.34, 0.0), (0.76, 0.27, 0.36, 0.0), (0.5, 0.41, 0.4, 0.18)):
        peak = horizon - tall
        rock = blend(hour.light((100, 105, 125)), (0, 0, 0), darker)
        for corners, colour in ((MOUNTAIN, rock), (SNOW, hour.light((245, 248, 252)))):
            points = [((x + wide * out) * width, (peak + (foot - peak) * down) * height) for out, down in corners]
            pen.polygon(points, fill=colour)
    _floor(canvas, horizon + 0.1, hour.light((95, 150, 80)))


def _draw_sea(canvas: Canvas, hour: Hour, horizon: float) -> None:
    _floor(canvas, horizon, hour.light((35, 105, 185)))
    pen = ImageDraw.Draw(canvas.large)
    width, height = canvas.large.size
    for row in range(4):
        y = (horizon + (1 - horizon) * (0.18 + 0.22 * row)) * height
        for wave in range(3):
            x = (0.08 + 0.37 * wave + 0.16 * (row % 2)) % 1.0 * width
            crest = ((x, y), (x + 0.16 * width, y))
            pen.line(crest, fill=hour.light((120, 180, 230)), width=max(1, int(canvas.edge * 0.012)))


GROUND_PAINTERS = {"hills": _draw_hills, "mountains": _draw_mountains, "sea": _draw_sea, "desert": _draw_desert}


def _draw_boat(canvas: Canvas, hour: Hour, x: float, y: float, colour: RGB) -> None:
    pen = ImageDraw.Draw(canvas.large)
    brush = Brush(pen, x * canvas.large.width, y * canvas.large.height, 0.21 * canvas.edge, colour, colour)
    brush.polygon((-0.9, 0.1), (0.9, 0.1), (0.55, 0.55), (-0.55, 0.55), fill=hour.light(BARK))
    brush.box(-0.04, -1.2, 0.04, 0.1, fill=hour.light((90, 55, 30)))
    brush.polygon((0.1, -1.15), (0.1, 0), (0.8, 0))
    brush.polygon((-0.1, -0.9), (-0.1, 0), (-0.6, 0), fill=blend(colour, (255, 255, 255), 0.35))
