from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from darkroom.engine import messages
from darkroom.engine.messages import (
    Cancel,
    Command,
    Decode,
    Done,
    Drop,
    Encoded,
    EncodingFailed,
    Error,
    Exit,
    Failed,
    Finished,
    Generate,
    Inbound,
    Loaded,
    Message,
    Outbound,
    Ping,
    Prepare,
    Prepared,
    Preview,
    Progress,
    Refusal,
    Reply,
    Status,
    Step,
    decode_command,
    decode_inbound,
    decode_outbound,
    decode_reply,
    encode,
    from_frames,
    to_frames,
)
from tests.golden import request

REQUEST = request("ein rotes Häuschen 🏠", seed=2**64 - 1, output_format="webp", partial_images=3)
STAGES = {"queue": 0.0, "denoise": 1.5}

MESSAGES: dict[type[Message], Message] = {
    Generate: Generate(id="a", request=REQUEST),
    Cancel: Cancel(id="a"),
    Ping: Ping(),
    Status: Status(state="failed", detail="no", is_config_error=True, waiting=2, running=1),
    Progress: Progress(id="a", step=1, num_steps=20, seconds=0.25, batch_size=2),
    Preview: Preview(id="a", index=1, image=bytes(range(256))),
    Finished: Finished(id="a", files=(b"", b"x"), seed=2**64 - 1, text_tokens=7, image_tokens=64, stages=STAGES),
    Failed: Failed(id="a", error="no", reason="busy", refusal=Refusal(message="no", param="image", code="bad")),
    Prepare: Prepare(ids=("a", "b"), requests=(REQUEST, REQUEST)),
    Step: Step(ids=("a", "b")),
    Decode: Decode(ids=("a",), preview=0),
    Drop: Drop(ids=()),
    Exit: Exit(),
    Loaded: Loaded(rank=3),
    Done: Done(rank=1, prepared=(Prepared(num_steps=20, text_tokens=7, image_tokens=64, input_image_tokens=9),)),
    Error: Error(rank=1, error="no", is_config_error=True, refusal=Refusal(message="no", param=None, code="bad")),
    Encoded: Encoded(id="a", files=(b"\x89PNG",), seconds=0.5, preview=0),
    EncodingFailed: EncodingFailed(id="a", error="no"),
}
DECODERS = {
    Inbound: decode_inbound,
    Outbound: decode_outbound,
    Command: decode_command,
    Reply: decode_reply,
}


@pytest.mark.parametrize(
    "kind", [kind for union in DECODERS for kind in get_args(union)], ids=lambda kind: kind.__name__
)
def test_a_message_survives_the_wire(kind: type[Message]) -> None:
    decode = next(decode for union, decode in DECODERS.items() if kind in get_args(union))
    assert decode(encode(MESSAGES[kind])) == MESSAGES[kind]


def test_every_message_belongs_to_one_direction() -> None:
    kinds = [kind for union in DECODERS for kind in get_args(union)]
    declared = {x for x in vars(messages).values() if isinstance(x, type) and issubclass(x, Message)} - {Message}
    assert set(kinds) == declared
    assert len(kinds) == len(set(kinds))


def test_a_message_of_another_direction_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_command(encode(Ping()))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", encode({"type": "Generate", "id": 3})])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_inbound(data)


def test_a_step_command_is_small() -> None:
    assert len(encode(Step(ids=("0" * 32,)))) < 100


@pytest.mark.parametrize("images", [(), (b"a",), (b"a", b"b")])
@pytest.mark.parametrize("mask", [None, b"mask"])
def test_pictures_lie_beside_their_message(images: tuple[bytes, ...], mask: bytes | None) -> None:
    request = msgspec.structs.replace(REQUEST, images=images, mask=mask if images else None)
    message = Generate(id="a", request=request)
    frames = to_frames(message)
    assert frames[1:] == [*images, *([mask] if images and mask else [])]
    assert all(any(frame is one for one in (*images, mask)) for frame in frames[1:])  # and are no copies
    assert from_frames(frames) == message
