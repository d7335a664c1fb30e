"""Pictures to file bytes. Runs on the output rank's encoder thread: pictures never travel as tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import av
from PIL import Image

from darkroom.configs.request import OutputFormat, Request

from .stills import thumbnail_and_spritesheet

_PNG_LEVEL = 1
"""Three to four times faster than zlib's default, for files a few per cent larger."""
_CRF = "18"
"""x264's constant quality: a video that the eye cannot tell from its frames, at a tenth of their size."""


def encode_files(pictures: Sequence[Image.Image], request: Request) -> tuple[bytes, ...]:
    """Of one request: a video of its frames, and what is shown of it if asked for; else a file for each picture.

    Raises RuntimeError for pictures of another size, and for a video of another length.
    """
    if others := {picture.size for picture in pictures} - {(request.width, request.height)}:
        width, height = others.pop()
        raise RuntimeError(f"the model made {width}x{height} where {request.width}x{request.height} were asked for")
    if request.fps and len(pictures) != request.num_frames:
        raise RuntimeError(f"the model made {len(pictures)} frames where {request.num_frames} were asked for")
    if request.output_format == "mp4":
        stills = thumbnail_and_spritesheet(pictures) if request.stills else ()
        return (encode_video(pictures, request.fps), *stills)
    return tuple(encode_picture(picture, request.output_format, request.output_compression) for picture in pictures)


def encode_preview(pictures: Sequence[Image.Image], request: Request) -> bytes:
    """One picture, which of a video is its first frame."""
    output_format = "png" if request.output_format == "mp4" else request.output_format
    return encode_picture(pictures[0], output_format, request.output_compression)


def encode_picture(picture: Image.Image, output_format: OutputFormat, output_compression: int) -> bytes:
    """The bytes of a PNG, JPEG or WebP file; `output_compression` is the quality of the latter two."""
    buffer = io.BytesIO()
    match output_format:
        case "png":
            picture.save(buffer, "PNG", compress_level=_PNG_LEVEL)
        case "jpeg":
            picture.convert("RGB").save(buffer, "JPEG", quality=output_compression)
        case "webp":
            picture.save(buffer, "WEBP", quality=output_compression)
        case "mp4":
            raise ValueError("a single picture is no video")
    return buffer.getvalue()


def encode_video(frames: Sequence[Image.Image], fps: int) -> bytes:
    """An H.264 video in MP4, its index in front, so that it plays while it is being fetched."""
    with TemporaryDirectory(prefix="darkroom-") as folder:  # moving the index takes a file that can be read again
        path = Path(folder) / "video.mp4"
        with av.open(path, "w", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": _CRF})
            stream.width, stream.height = frames[0].size
            stream.pix_fmt = "yuv420p"  # what every player takes
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))  # type: ignore[no-untyped-call]
            container.mux(stream.encode(None))
        return path.read_bytes()
