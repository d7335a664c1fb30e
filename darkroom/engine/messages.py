"""Everything that crosses a process boundary. The types are the wire format: msgspec tagged unions in msgpack.

Every request that was accepted ends in exactly one of `Finished`, `Failed`, or its client's own `Cancel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from darkroom.configs.errors import RequestError
from darkroom.configs.request import Request


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the class name is the tag on the wire."""


# server -> engine


class Generate(Message, frozen=True):
    id: str
    request: Request


class Cancel(Message, frozen=True):
    id: str


class Ping(Message, frozen=True):
    """Answered by `Status`. A client's first message: from then on the engine tells it of every change of state."""


# engine -> server


class Status(Message, frozen=True):
    state: Literal["starting", "ready", "restarting", "failed"]
    detail: str = ""
    is_config_error: bool = False
    """The operator can mend it: the command line says `detail` in one line and exits with 2."""
    waiting: int = 0
    running: int = 0


class Progress(Message, frozen=True):
    id: str
    step: int
    num_steps: int
    seconds: float
    """How long this step took."""
    batch_size: int


class Preview(Message, frozen=True):
    """A picture decoded from the current estimate of the clean latents."""

    id: str
    index: int
    image: bytes


class Finished(Message, frozen=True):
    id: str
    files: tuple[bytes, ...]
    """One for most models; a layered picture has one for each layer, and so a video's frames as pictures."""
    seed: int
    text_tokens: int
    image_tokens: int
    stages: dict[str, float]
    """Seconds by stage: queue, prepare, denoise, decode, encode."""
    input_image_tokens: int = 0
    """Of the pictures that came with the request, as the transformer knows them."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A `RequestError` on the wire: the request's own fault, such as a picture that cannot be decoded."""

    message: str
    param: str | None
    code: str

    @classmethod
    def of(cls, error: Exception) -> Refusal | None:
        if not isinstance(error, RequestError):
            return None
        return cls(message=str(error), param=error.param, code=error.code)

    def as_error(self) -> RequestError:
        return RequestError(self.message, param=self.param, code=self.code)


class Failed(Message, frozen=True):
    id: str
    error: str
    refusal: Refusal | None = None
    """Where the client is at fault, and is told so."""
    reason: Literal["internal", "unavailable", "busy"] = "internal"


# engine -> workers: every worker gets every command, in the same order


class Prepare(Message, frozen=True):
    ids: tuple[str, ...]
    requests: tuple[Request, ...]


class Step(Message, frozen=True):
    """One denoising step of samples that can share a forward pass."""

    ids: tuple[str, ...]


class Decode(Message, frozen=True):
    """Turn latents into encoded pictures. With `preview`, the current estimate, and the samples stay in flight."""

    ids: tuple[str, ...]
    preview: int | None = None
    """The index of the preview."""


class Drop(Message, frozen=True):
    ids: tuple[str, ...]


class Exit(Message, frozen=True):
    pass


# workers -> engine: one `Done` or `Error` per worker and command; the output rank's encoder thread answers by itself


class Loaded(Message, frozen=True):
    rank: int


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    num_steps: int
    text_tokens: int
    image_tokens: int
    input_image_tokens: int = 0


class Done(Message, frozen=True):
    rank: int
    prepared: tuple[Prepared, ...] = ()


class Error(Message, frozen=True):
    rank: int
    error: str
    is_config_error: bool = False
    refusal: Refusal | None = None


class Encoded(Message, frozen=True):
    id: str
    files: tuple[bytes, ...]
    seconds: float
    preview: int | None = None


class EncodingFailed(Message, frozen=True):
    id: str
    error: str


Inbound = Generate | Cancel | Ping
Event = Progress | Preview | Finished | Failed
Outbound = Status | Event
Command = Prepare | Step | Decode | Drop | Exit
FromEncoder = Encoded | EncodingFailed
Reply = Loaded | Done | Error | FromEncoder

encode = msgspec.msgpack.Encoder().encode
decode_inbound = msgspec.msgpack.Decoder(Inbound).decode
decode_outbound = msgspec.msgpack.Decoder(Outbound).decode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def to_frames(message: Inbound) -> list[bytes]:
    """The message, and beside it the pictures that it brings: tens of megabytes, which so need not be copied."""
    if not isinstance(message, Generate) or not message.request.images:
        return [encode(message)]
    request = message.request
    masks = () if request.mask is None else (request.mask,)
    bare = msgspec.structs.replace(request, images=(), mask=b"" if masks else None)
    return [encode(msgspec.structs.replace(message, request=bare)), *request.images, *masks]


def from_frames(frames: Sequence[bytes]) -> Inbound:
    """Raises msgspec.DecodeError."""
    message: Inbound = decode_inbound(frames[0])
    if len(frames) == 1 or not isinstance(message, Generate):
        return message
    has_mask = message.request.mask is not None
    images, mask = (frames[1:-1], frames[-1]) if has_mask else (frames[1:], None)
    return msgspec.structs.replace(
        message, request=msgspec.structs.replace(message.request, images=tuple(images), mask=mask)
    )
