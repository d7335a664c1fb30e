"""Pictures that come with a request: opened, turned upright, and refused where they are none."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import RequestError

MAX_PIXELS = 64 * 1024 * 1024
"""Of a picture that is sent in: what is larger is refused by its header, before it is decoded."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112
_ON_THEIR_SIDE = range(5, 9)


def picture_size(data: bytes, param: str) -> tuple[int, int]:
    """(width, height) of a picture as it is to be seen, by its header. Raises RequestError for what is none."""
    with _open(data, param) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise RequestError(
                f"'{param}' has {width}x{height} pixels; at most {MAX_PIXELS} can be taken.", param=param
            )
        return (height, width) if _orientation(picture) in _ON_THEIR_SIDE else (width, height)


def load_picture(data: bytes, param: str = "image") -> Image.Image:
    """The whole picture, upright, as RGB, or RGBA where it has an alpha channel. Raises RequestError."""
    with _open(data, param) as picture:
        try:
            upright = ImageOps.exif_transpose(picture) if _orientation(picture) > 1 else picture
            return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        except (OSError, SyntaxError, ValueError) as e:
            raise RequestError(f"'{param}' cannot be decoded: the file is broken.", param=param) from e


def load_mask(data: bytes, param: str = "mask") -> Image.Image:
    """What is drawn anew, as white in a greyscale picture.

    Where the file has an alpha channel that is what is transparent, as in OpenAI's API; else what is white.
    """
    picture = load_picture(data, param)
    if picture.mode == "RGBA":
        return ImageOps.invert(picture.getchannel("A"))
    return picture.convert("L")


def _orientation(picture: Image.Image) -> int:
    """EXIF's, 1 for upright. Cameras write it into JPEG and WebP; a PNG would have to be decoded to look for it."""
    return 1 if picture.format == "PNG" else int(picture.getexif().get(_ORIENTATION, 1))


def _open(data: bytes, param: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(f"'{param}' has too many pixels; at most {MAX_PIXELS} can be taken.", param=param) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise RequestError(f"'{param}' is no PNG, JPEG or WebP file.", param=param) from None
