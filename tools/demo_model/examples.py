"""The data set: prompts with their pictures, drawn as they are needed, each from its own seed.

Twelve pairs of a colour and a shape are held out: no picture that is trained on shows one of them in any place, so the
judge's pictures are of things that the model must put together itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from PIL import Image

from tools.demo_model import scenes
from tools.demo_model.shapes import COLOURS, RGB, SHAPES, Canvas

HELD_OUT = {
    *(("red", "star"), ("blue", "heart"), ("green", "cat"), ("purple", "circle"), ("orange", "house")),
    *(("yellow", "triangle"), ("pink", "car"), ("cyan", "fish"), ("black", "moon"), ("white", "flower")),
    *(("brown", "square"), ("gray", "ring")),
}

Kind = Literal["single", "count", "relation", "scene", "plain"]
SHARES: dict[Kind, float] = {"single": 0.25, "count": 0.3, "relation": 0.27, "scene": 0.14, "plain": 0.04}

PLURALS = {**{shape: f"{shape}s" for shape in SHAPES}, "cross": "crosses", "fish": "fish"}
NUMBERS = ("one", "two", "three", "four", "five")

PLACES = {
    "center": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
"""the centre of what is there, as fractions of width and height"""

ROWS: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((0.5, 0.5),),
    2: ((0.26, 0.5), (0.74, 0.5)),
    3: ((0.5, 0.26), (0.26, 0.74), (0.74, 0.74)),
    4: ((0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)),
    5: ((0.18, 0.18), (0.82, 0.18), (0.18, 0.82), (0.82, 0.82), (0.5, 0.5)),
}
"""where so many of a thing stand: far enough from each other that they stay apart in pictures of 96 pixels"""

SIZES = {"small": ("small", "tiny", "little"), "medium": ("",), "large": ("large", "big", "huge")}
ALONE = {"small": 0.3, "medium": 0.5, "large": 0.78}
PAIRED = {"small": 0.3, "medium": 0.35, "large": 0.42}
CORNERED, COUNTED, CROWDED, OUTER, INNER = 0.4, 0.36, 0.28, 0.86, 0.4
"""edges of things as fractions of the picture's shorter one: off the centre; of 2 to 4; of 5; around; inside"""

FRAMES = ("circle", "square", "hexagon")
"""what another thing can be inside of"""

RELATIONS = {
    "above": ((0.5, 0.25), (0.5, 0.75), ("above", "over", "on top of")),
    "below": ((0.5, 0.75), (0.5, 0.25), ("below", "under")),
    "left": ((0.25, 0.5), (0.75, 0.5), ("to the left of", "left of")),
    "right": ((0.75, 0.5), (0.25, 0.5), ("to the right of", "right of")),
    "inside": ((0.5, 0.5), (0.5, 0.5), ("inside", "in", "within")),
}
"""where the first thing is, where the second, and what it is called"""

ALIKE = {
    frozenset(pair)
    for pair in (
        *(("orange", "red"), ("orange", "brown"), ("orange", "yellow"), ("cyan", "green"), ("gray", "brown")),
        *(("blue", "purple"), ("pink", "gray"), ("brown", "black"), ("brown", "red")),
    )
}
"""colours that are not put onto each other"""


@dataclass(frozen=True)
class Thing:
    """What is where: the centre as fractions of width and height, the edge as one of the shorter of both."""

    colour: str
    shape: str
    x: float
    y: float
    size: float

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT


@dataclass(frozen=True)
class Example:
    """A prompt, and what it says. `relation`: of two things, where the first one is."""

    kind: Kind
    prompt: str
    background: str = ""
    things: tuple[Thing, ...] = ()
    fades: str | None = None
    """the background is a gradient, at its top this colour"""

    relation: str | None = None
    landscape: scenes.Landscape | None = None

    def draw(self, width: int, height: int, random: Random) -> Image.Image:
        """Colours vary by a few levels, as do the landscapes."""
        if self.landscape:
            canvas = Canvas.blank(width, height)
            scenes.draw(self.landscape, canvas, random)
            return canvas.picture()
        canvas = Canvas.blank(width, height, _vary(COLOURS[self.background], random))
        if self.fades:
            canvas.fade(COLOURS[self.fades], COLOURS[self.background])
        colours = {thing.colour: _vary(COLOURS[thing.colour], random) for thing in self.things}
        for thing in reversed(self.things):  # what is inside comes last
            behind = colours[self.things[1].colour] if self.relation == "inside" and thing is self.things[0] else None
            canvas.draw(thing.shape, thing.x, thing.y, thing.size, colours[thing.colour], behind)
        return canvas.picture()


def example(random: Random, kind: Kind | None = None, held_out: bool = False) -> Example:
    """One of the data set, or, `held_out`, one of the judge's: it shows a pair of HELD_OUT, on a plain background.

    The judge's always name colour and background.
    """
    kind = kind or random.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "scene":
        while (landscape := scenes.imagine(random)).thing in HELD_OUT:
            pass
        made = Example(kind, scenes.describe(landscape, random), landscape=landscape)
    elif kind == "plain":
        made = _plain(random)
    else:
        made = {"single": _single, "count": _count, "relation": _relation}[kind](random, held_out)
    return made if held_out else Example(**{**vars(made), "prompt": _reword(made.prompt, random)})


def _plain(random: Random) -> Example:
    one, other = random.sample(list(COLOURS), 2)
    if random.random() < 0.5:
        prompt = random.choice([f"{_a(one)} background", f"just {one}", f"a plain {one} picture"])
        return Example("plain", prompt, one)
    prompt = random.choice([f"a gradient from {one} to {other}", f"{_a(one)} to {other} gradient"])
    return Example("plain", prompt, other, fades=one)


def _single(random: Random, held_out: bool) -> Example:
    colour, shape = _pair(random, held_out)
    size = random.choice(["small", "medium", "medium", "large"])
    place = "center" if size == "large" or random.random() < 1 / 3 else random.choice(list(PLACES)[1:])
    edge = CORNERED if size == "medium" and place != "center" else ALONE[size]
    named = colour if held_out or random.random() < 0.93 else ""
    subject = _noun(random, named, shape, size) + _place_phrase(random, place)
    things = (Thing(colour, shape, *PLACES[place], edge),)
    return _on_background(random, held_out, "single", subject, things)


def _count(random: Random, held_out: bool) -> Example:
    colour, shape = _pair(random, held_out)
    number = random.choice([1, 2, 2, 3, 3, 4, 4, 5, 5]) if not held_out else random.randint(1, 5)
    size = {1: ALONE["medium"], 5: CROWDED}.get(number, COUNTED)
    things = tuple(Thing(colour, shape, x, y, size) for x, y in ROWS[number])
    subject = f"{NUMBERS[number - 1]} {colour} {shape if number == 1 else PLURALS[shape]}"
    return _on_background(random, held_out, "count", subject, things)


def _relation(random: Random, held_out: bool) -> Example:
    relation = random.choice(list(RELATIONS))
    first_held_out = random.random() < 0.5
    while True:
        first, second = _pair(random, held_out and first_held_out), _pair(random, held_out and not first_held_out)
        if relation == "inside" and second[1] not in FRAMES:
            if held_out and not first_held_out:
                second = random.choice([pair for pair in sorted(HELD_OUT) if pair[1] in FRAMES])
            else:
                second = (second[0], random.choice(FRAMES))
        if not held_out and (second in HELD_OUT):
            continue
        if relation != "inside" or _contrast(first[0], second[0]):
            break
    *centres, words = RELATIONS[relation]
    sizes = [random.choice(["small", "medium", "medium", "large"]) for _ in centres]
    edges = [PAIRED[size] for size in sizes]
    if relation == "inside":
        sizes, edges = ["medium", "medium"], [INNER, OUTER]
    things = tuple(
        Thing(*pair, *centre, edge) for pair, centre, edge in zip((first, second), centres, edges, strict=True)
    )
    one, other = (_noun(random, *pair, size) for pair, size in zip((first, second), sizes, strict=True))
    if relation in ("left", "right") and random.random() < 0.3:
        opposite = "right" if relation == "left" else "left"
        subject = f"{one} on the {relation} and {other} on the {opposite}"
    else:
        subject = f"{one} {random.choice(words)} {other}"
    return _on_background(random, held_out, "relation", subject, things, relation)


def _on_background(
    random: Random, held_out: bool, kind: Kind, subject: str, things: tuple[Thing, ...], relation: str | None = None
) -> Example:
    """White where the prompt does not say."""
    colours = {thing.colour for thing in things}
    if not held_out and "white" not in colours and random.random() < 0.15:
        return Example(kind, subject, "white", things, relation=relation)
    background = random.choice([name for name in COLOURS if all(_contrast(name, colour) for colour in colours)])
    if not held_out and relation is None and random.random() < 0.1:
        phrase = f" on {_a(background)} gradient" + random.choice([" background", ""])
        return Example(kind, subject + phrase, background, things, fades="white")
    phrases = [f" on {_a(background)} background"] * 5
    phrases += [f" on {background}", f", {background} background"]
    phrases += [f" against {_a(background)} background", f" over {_a(background)} background"]
    return Example(kind, subject + random.choice(phrases), background, things, relation=relation)


def _pair(random: Random, held_out: bool) -> tuple[str, str]:
    if held_out:
        return random.choice(sorted(HELD_OUT))
    while True:
        pair = random.choice(list(COLOURS)), random.choice(list(SHAPES))
        if pair not in HELD_OUT:
            return pair


def _contrast(one: str, other: str) -> bool:
    """Whether a thing of the one colour is seen on the other."""
    distance = sum((a - b) ** 2 for a, b in zip(COLOURS[one], COLOURS[other], strict=True)) ** 0.5
    return distance > 95 and frozenset((one, other)) not in ALIKE


def _vary(colour: RGB, random: Random) -> RGB:
    red, green, blue = (max(0, min(255, level + random.randint(-7, 7))) for level in colour)
    return red, green, blue


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun(random: Random, colour: str, shape: str, size: str) -> str:
    name = "smiling face" if shape == "face" and random.random() < 0.5 else shape
    return _a(" ".join(word for word in (random.choice(SIZES[size]), colour, name) if word))


def _place_phrase(random: Random, place: str) -> str:
    if place == "center":
        return random.choice(["", "", "", " in the center", " in the middle"])
    if place in ("left", "right"):
        return random.choice([f" on the {place}", f" on the {place} side"])
    if place in ("top", "bottom"):
        return f" at the {place}"
    return random.choice([f" in the {place} corner", f" in the {place}"])


def _reword(prompt: str, random: Random) -> str:
    """The same said as people do: with an order, a capital, a full stop, in British English."""
    if random.random() < 0.06:
        prompt = random.choice(["a picture of ", "draw ", "an image of ", "a drawing of ", "please draw "]) + prompt
    if random.random() < 0.12:
        prompt = prompt[0].upper() + prompt[1:]
    if random.random() < 0.1:
        prompt += "."
    if random.random() < 0.04:
        prompt = prompt.replace("gray", "grey").replace("center", "centre")
    return prompt
