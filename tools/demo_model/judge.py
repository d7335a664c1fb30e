"""Scores pictures against what their prompts say, by comparing what stands in them with every thing in every colour.

It is not told what to look for: of 20 shapes in 12 colours it names the one that is nearest, and then that is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.demo_model.examples import Example, Thing
from tools.demo_model.shapes import COLOURS, RGB, SHAPES, Canvas

Pixels = NDArray[np.float32]
"""(rows, columns, 3), 0 to 255"""
Mask = NDArray[np.bool_]
"""(rows, columns)"""

PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
FOREGROUND = 75
"""the sum of differences over the three colours from which a pixel is not of the background"""
EDGE = 32
"""things are compared in squares of so many pixels"""
NEAR = 0.1
"""how far the centre of a thing may be from its place, as a fraction of width or height"""
ZOOMS = (0.94, 1.0, 1.06)
"""of what things are compared with: a small thing's bounds shrink so much where a soft corner ends a pixel early"""
SIZE_RANGE = (0.7, 1.4)
"""how large a thing may be, as a multiple of what it should be"""

Score = dict[str, bool]
"""question -> whether the answer is as the prompt says; `everything`: whether all are"""


def judge(picture: Image.Image, example: Example) -> Score:
    """Of single things, counts and relations on plain backgrounds."""
    pixels = np.asarray(picture, dtype=np.float32)
    behind = background_of(pixels)
    score = {"background": nearest_colour(behind) == example.background}
    foreground = apart(pixels, behind)
    if example.kind == "single":
        score |= _judge_thing(pixels, foreground, behind, example.things[0])
    elif example.kind == "count":
        score |= _judge_count(pixels, foreground, behind, example)
    elif example.relation == "inside":
        score |= _judge_inside(pixels, foreground, behind, example)
    else:
        score |= _judge_pair(pixels, foreground, behind, example)
    return {**score, "everything": all(score.values())}


def colour_of(picture: Image.Image) -> str:
    """Of the thing on a plain background; the background's where there is none."""
    pixels = np.asarray(picture, dtype=np.float32)
    behind = background_of(pixels)
    seen = look(pixels, apart(pixels, behind), behind)
    return seen.colour if seen else nearest_colour(behind)


def background_of(pixels: Pixels) -> Pixels:
    """The colour of the upper and the lower border."""
    return np.asarray(np.median(np.concatenate([pixels[:3], pixels[-3:]], axis=1), axis=(0, 1)))


def rates(scores: list[Score]) -> dict[str, float]:
    """Question -> the share of pictures of which it is answered rightly."""
    return {question: float(np.mean([score[question] for score in scores])) for question in scores[0]}


def _judge_thing(pixels: Pixels, mask: Mask, behind: Pixels, thing: Thing) -> Score:
    seen = look(pixels, mask, behind)
    if seen is None:
        return dict.fromkeys(("colour", "shape", "place", "size"), False)
    rows, columns = mask.shape
    ratio = seen.edge / (thing.size * min(rows, columns) * _extent(thing.shape))
    return {
        "colour": seen.colour == thing.colour,
        "shape": seen.shape == thing.shape,
        "place": bool(abs(seen.x / columns - thing.x) < NEAR and abs(seen.y / rows - thing.y) < NEAR),
        "size": bool(SIZE_RANGE[0] < ratio < SIZE_RANGE[1]),
    }


def _judge_count(pixels: Pixels, foreground: Mask, behind: Pixels, example: Example) -> Score:
    wanted = example.things[0]
    found = [look(pixels, piece, behind) for piece in pieces(foreground)]
    seen = [thing for thing in found if thing]
    return {
        "count": len(seen) == len(example.things),
        "colour": bool(seen) and all(thing.colour == wanted.colour for thing in seen),
        "shape": bool(seen) and all(thing.shape == wanted.shape for thing in seen),
    }


def _judge_pair(pixels: Pixels, foreground: Mask, behind: Pixels, example: Example) -> Score:
    """Each thing in its half of the picture."""
    rows, columns = foreground.shape
    scores = []
    for thing, other in zip(example.things, reversed(example.things), strict=True):
        half = np.zeros_like(foreground)
        half[
            slice(rows // 2) if thing.y < other.y else slice(rows // 2 if thing.y > other.y else 0, rows),
            slice(columns // 2) if thing.x < other.x else slice(columns // 2 if thing.x > other.x else 0, columns),
        ] = True
        scores.append(_judge_thing(pixels, foreground & half, behind, thing))
    return _both(*scores)


def _judge_inside(pixels: Pixels, foreground: Mask, behind: Pixels, example: Example) -> Score:
    """What is inside is taken out, and each is looked at by itself."""
    inner, outer = example.things
    rows, columns = foreground.shape
    down, across = np.ogrid[:rows, :columns]
    edge = min(rows, columns)
    far = np.hypot(down - (rows - 1) / 2, across - (columns - 1) / 2) / edge
    around = np.median(pixels[(far > 0.27) & (far < 0.33)], axis=0)
    within = far < 0.28
    emptied = np.where(within[:, :, None], around, pixels)
    return _both(
        _judge_thing(pixels, within & apart(pixels, around), around, inner),
        _judge_thing(emptied, foreground | within, behind, outer),
    )


def _both(one: Score, other: Score) -> Score:
    return {question: one[question] and other[question] for question in one}


class Seen:
    """A thing as it looks: its middle and the longer edge of its bounds in pixels, and which one it is."""

    def __init__(self, pixels: Pixels, mask: Mask, behind: Pixels) -> None:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        bounds = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        self.x, self.y = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
        self.edge = max(bounds[2] - bounds[0], bounds[3] - bounds[1])
        self.colour, self.shape = _nearest(cut_out(pixels, mask, behind, bounds), nearest_colour(behind))


def look(pixels: Pixels, mask: Mask, behind: Pixels) -> Seen | None:
    """The thing that `mask` covers; nothing where there are too few pixels to be one."""
    return Seen(pixels, mask, behind) if mask.mean() > 0.004 else None


def cut_out(pixels: Pixels, mask: Mask, behind: Pixels, bounds: tuple[int, int, int, int]) -> Pixels:
    """The square around a thing, as EDGE x EDGE pixels; what is not the thing has the background's colour."""
    left, top, right, bottom = (int(x) for x in bounds)
    edge = max(right - left, bottom - top)
    square = np.empty((edge, edge, 3), dtype=np.float32)
    square[:] = behind
    row, column = (edge - bottom + top) // 2, (edge - right + left) // 2
    inside = np.where(filled(mask)[:, :, None], pixels, behind)[top:bottom, left:right]
    square[row : row + bottom - top, column : column + right - left] = inside
    resized = Image.fromarray(square.round().astype(np.uint8)).resize((EDGE, EDGE), Image.Resampling.BOX)
    return np.asarray(resized, dtype=np.float32)


def filled(mask: Mask) -> Mask:
    """The mask and one pixel around it, where edges are soft."""
    wide = np.pad(mask, 1)
    rows, columns = mask.shape
    parts = [wide[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return np.asarray(np.logical_or.reduce(parts))


def apart(pixels: Pixels, colour: Pixels) -> Mask:
    return np.asarray(np.abs(pixels - colour).sum(axis=-1) > FOREGROUND)


def nearest_colour(colour: Pixels) -> str:
    return list(COLOURS)[int(((PALETTE - colour) ** 2).sum(axis=1).argmin())]


def pieces(mask: Mask) -> Iterator[Mask]:
    """The connected parts, which are the things that can be counted; specks are none."""
    left = mask.copy()
    while left.any():
        row, column = np.argwhere(left)[0]
        piece = np.zeros_like(mask)
        piece[row, column] = True
        while True:
            grown = filled(piece) & left
            if (grown == piece).all():
                break
            piece = grown
        left &= ~piece
        if piece.mean() > 0.004:
            yield piece


def _nearest(square: Pixels, behind: str) -> tuple[str, str]:
    names, squares = _references(behind)
    return names[int(np.abs(squares - square).mean(axis=(1, 2, 3)).argmin())]


@cache
def _references(behind: str) -> tuple[list[tuple[str, str]], Pixels]:
    """Every thing in every colour but the background's own, each a little smaller and a little larger too."""
    names, squares = [], []
    for colour in COLOURS:
        for shape in SHAPES:
            if colour != behind:
                names += [(colour, shape)] * len(ZOOMS)
                squares += _reference(COLOURS[colour], shape, COLOURS[behind])
    return names, np.stack(squares)


def _reference(colour: RGB, shape: str, behind: RGB) -> list[Pixels]:
    canvas = Canvas.blank(2 * EDGE, 2 * EDGE, behind)
    canvas.draw(shape, 0.5, 0.5, 0.8, colour, behind)
    picture = canvas.picture()
    mask = apart(np.asarray(picture, dtype=np.float32), np.array(behind, dtype=np.float32))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    y, x = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    half = (max(np.ptp(rows), np.ptp(columns)) + 1) / 2
    boxes = [(x - half * zoom, y - half * zoom, x + half * zoom, y + half * zoom) for zoom in ZOOMS]
    size = (EDGE, EDGE)
    return [np.asarray(picture.resize(size, Image.Resampling.BOX, box), dtype=np.float32) for box in boxes]


@cache
def _extent(shape: str) -> float:
    """The longer edge of what is seen of a thing, as a fraction of the square that it is drawn in."""
    canvas = Canvas.blank(64, 64, COLOURS["white"])
    canvas.draw(shape, 0.5, 0.5, 0.8, COLOURS["black"])
    rows, columns = np.nonzero(apart(np.asarray(canvas.picture(), dtype=np.float32), PALETTE[-2]))
    return float(max(np.ptp(rows), np.ptp(columns)) + 1) / (0.8 * 64)
