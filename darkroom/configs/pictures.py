"""Pictures that come with a request: opened, turned upright, and refused where they are none."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageMath, ImageOps

from .errors import RequestError

MAX_PIXELS = 64 * 1024 * 1024
"""Of a picture that is sent in: what is larger is refused by its header, before it is decoded."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 65_536
"""Of a PNG file. Writers make chunks of some kilobytes; millions of empty ones would keep the reader busy."""
_ORIENTATION = 0x0112
_ON_THEIR_SIDE = range(5, 9)


def picture_size(data: bytes, param: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of a picture as it is to be seen, by its header. Raises RequestError for what is none."""
    with _open(data, param) as picture:
        width, height = picture.size
        if width * height > max_pixels:
            raise RequestError(
                f"'{param}' has {width}x{height} pixels; at most {max_pixels} can be taken.", param=param
            )
        return (height, width) if _orientation(picture) in _ON_THEIR_SIDE else (width, height)


def load_picture(data: bytes, param: str = "image") -> Image.Image:
    """The whole picture, upright, as RGB, or RGBA where it has an alpha channel. Raises RequestError."""
    with _open(data, param) as picture:
        try:
            upright = ImageOps.exif_transpose(picture) if _orientation(picture) > 1 else picture
            if upright.mode.startswith("I"):
                upright = _in_8_bits(upright)
            return upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        except MemoryError:
            raise
        except Exception as e:  # Pillow raises almost anything at broken files: struct.error, AssertionError, ...
            raise RequestError(f"'{param}' cannot be decoded: the file is broken.", param=param) from e


def load_mask(data: bytes, param: str = "mask") -> Image.Image:
    """What is drawn anew, as white in a greyscale picture.

    Where the file has an alpha channel that is what is transparent, as in OpenAI's API; else what is white.
    """
    picture = load_picture(data, param)
    if picture.mode == "RGBA":
        return ImageOps.invert(picture.getchannel("A"))
    return picture.convert("L")


def _in_8_bits(grey: Image.Image) -> Image.Image:
    """Of 16: `convert` would cut them off at 255. An alpha channel says where the value was that stands for nothing."""
    values = grey.convert("I")
    scaled = values.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    scaled.info.pop("transparency", None)
    if (nothing := grey.info.get("transparency")) is None:
        return scaled
    alpha = ImageMath.lambda_eval(lambda images: (images["values"] != nothing) * 255, values=values)
    return Image.merge("LA", (scaled, alpha.convert("L")))


def _orientation(picture: Image.Image) -> int:
    """EXIF's, 1 for upright. Cameras write it into JPEG and WebP; a PNG would have to be decoded to look for it."""
    if picture.format == "PNG":
        return 1
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's reader has no one error for EXIF that is broken; the picture may be whole
        return 1
    return orientation if orientation in range(1, 9) else 1


def _open(data: bytes, param: str) -> Image.Image:
    _check_chunks(data, param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(f"'{param}' has too many pixels; at most {MAX_PIXELS} can be taken.", param=param) from None
    except MemoryError:
        raise
    except Exception:
        raise RequestError(f"'{param}' is no PNG, JPEG or WebP file.", param=param) from None


def _check_chunks(data: bytes, param: str) -> None:
    if not data.startswith(_PNG):
        return
    position, count = len(_PNG), 0
    while position + 8 <= len(data):
        position += 12 + int.from_bytes(data[position : position + 4])  # length, type, content, checksum
        count += 1
        if count > _MAX_CHUNKS:
            raise RequestError(f"'{param}' is a PNG file of more than {_MAX_CHUNKS} chunks.", param=param)
