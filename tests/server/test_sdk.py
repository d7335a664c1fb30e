"""Every call of OpenAI's SDK that a server can answer, from end to end: its real clients, waiting and asynchronous,
real server processes, real models, real files."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import av
import openai
import pytest
from openai import HttpxBinaryResponseContent
from PIL import Image

from bench.processes import Server
from tests.golden import picture_file

PICTURE, OTHER, MASK = picture_file(64, 64), picture_file(96, 64, 1), picture_file(64, 64, mode="L")
Call = Callable[[Any], Awaitable[None]]


async def got(value: Any) -> Any:
    """What a call of either client comes to."""
    return await value if inspect.isawaitable(value) else value


async def each(values: Any) -> AsyncIterator[Any]:
    """The items of a page or a stream of either client."""
    if hasattr(values, "__aiter__"):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value


def use(server: Server, kind: str, call: Call) -> None:
    """Make the call with the client of this kind."""
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "any", "max_retries": 0, "timeout": 60}

    async def run() -> None:
        if kind == "async":
            async with openai.AsyncOpenAI(**options) as client:
                await call(client)
        else:
            with openai.OpenAI(**options) as client:
                await call(client)

    asyncio.run(run())


def opened(item: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json, validate=True)))


# ---- pictures --------------------------------------------------------------------------------------------------------


async def models(client: Any) -> None:
    [model] = [model async for model in each(await got(client.models.list()))]
    assert (await got(client.models.retrieve(model.id))).id == model.id
    with pytest.raises(openai.NotFoundError) as caught:
        await got(client.models.retrieve("org/none"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as refused:
        await got(client.models.delete(model.id))
    assert refused.value.status_code == 405


async def generate(client: Any) -> None:
    answer = await got(
        client.images.generate(
            prompt="x",
            n=2,
            size="96x64",
            quality="low",
            background="opaque",
            output_format="jpeg",
            output_compression=80,
            moderation="low",
            user="somebody",
            response_format="b64_json",
            extra_body={"seed": 5, "steps": 3},
        )
    )
    assert [(opened(item).format, opened(item).size) for item in answer.data] == [("JPEG", (96, 64))] * 2
    assert (answer.size, answer.quality, answer.output_format, answer.background) == ("96x64", "low", "jpeg", "opaque")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert answer._request_id.startswith("req_")


async def generate_in_a_stream(client: Any) -> None:
    whole = await got(client.images.generate(prompt="x", extra_body={"seed": 5, "steps": 4}))
    stream = client.images.generate(prompt="x", stream=True, partial_images=2, extra_body={"seed": 5, "steps": 4})
    events = [event async for event in each(await got(stream))]
    assert [event.type.partition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[-1].b64_json == whole.data[0].b64_json
    assert events[-1].usage.total_tokens == whole.usage.total_tokens


async def generate_as_a_url(client: Any) -> None:
    answer = await got(client.images.generate(prompt="x", response_format="url"))
    response = await got(client.get(answer.data[0].url, cast_to=HttpxBinaryResponseContent))
    assert Image.open(io.BytesIO(await got(response.aread()))).size == (64, 64)


async def edit(client: Any) -> None:
    options = {"prompt": "x", "size": "64x64", "quality": "low", "input_fidelity": "high", "extra_body": {"seed": 5}}
    answer = await got(client.images.edit(image=PICTURE, mask=MASK, output_format="webp", **options))
    assert opened(answer.data[0]).format == "WEBP"
    assert answer.usage.input_tokens_details.image_tokens == 16
    named = await got(client.images.edit(image=("a.png", PICTURE, "image/png"), mask=io.BytesIO(MASK), **options))
    listed = await got(client.images.edit(image=[PICTURE], mask=MASK, **options))
    assert named.data[0].b64_json == listed.data[0].b64_json
    with pytest.raises(openai.BadRequestError) as caught:
        await got(client.images.edit(image=[PICTURE, OTHER], **options))
    assert (caught.value.param, caught.value.type) == ("image", "invalid_request_error")


async def edit_in_a_stream(client: Any) -> None:
    stream = client.images.edit(image=PICTURE, prompt="x", stream=True, partial_images=1, quality="high")
    events = [event async for event in each(await got(stream))]
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert all(opened(event).size == (64, 64) for event in events)


async def variations(client: Any) -> None:
    with pytest.deprecated_call():
        answer = await got(client.images.create_variation(image=PICTURE, n=2, size="64x64", user="somebody"))
    assert len({item.b64_json for item in answer.data}) == 2


async def videos_of_a_model_that_makes_none(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no videos"):
        await got(client.videos.create(prompt="x"))


PICTURES = (
    models, generate, generate_in_a_stream, generate_as_a_url, edit, edit_in_a_stream, variations,
    videos_of_a_model_that_makes_none,
)  # fmt: skip


@pytest.mark.parametrize("call", PICTURES, ids=lambda call: call.__name__)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_pictures(picture_server: Server, kind: str, call: Call) -> None:
    use(picture_server, kind, call)


# ---- videos ----------------------------------------------------------------------------------------------------------


def facts(data: bytes) -> tuple[int, int, int, float]:
    """(width, height, frames, frames per second)"""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height, sum(1 for _ in container.decode(stream)), float(stream.average_rate)


async def create_and_poll(client: Any) -> None:
    made = await got(
        client.videos.create_and_poll(
            prompt="x", seconds="1", size="96x64", input_reference=PICTURE, poll_interval_ms=20
        )
    )
    assert (made.status, made.progress, made.seconds, made.size, made.error) == ("completed", 100, "1", "96x64", None)
    assert made.completed_at >= made.created_at and made.expires_at > made.completed_at
    content = await got(client.videos.download_content(made.id))
    assert facts(content.content) == (96, 64, 5, 4.0)


async def create_poll_and_download(client: Any, folder: Path) -> None:
    made = await got(client.videos.create(prompt="x", extra_body={"num_frames": 9, "fps": 8}))
    assert made.status in ("queued", "in_progress") and made.object == "video"
    assert (await got(client.videos.poll(made.id, poll_interval_ms=20))).status == "completed"
    content = await got(client.videos.download_content(made.id, variant="video"))
    content.write_to_file(folder / "a.mp4")
    assert facts((folder / "a.mp4").read_bytes()) == (64, 64, 9, 8.0)
    for variant, kind in (("thumbnail", "WEBP"), ("spritesheet", "JPEG")):
        picture = (await got(client.videos.download_content(made.id, variant=variant))).content
        assert Image.open(io.BytesIO(picture)).format == kind
    assert await streamed(client, made.id) == (folder / "a.mp4").read_bytes()


def kind_of(client: Any) -> bool:
    """Whether it is asynchronous."""
    return isinstance(client, openai.AsyncOpenAI)


async def streamed(client: Any, id: str) -> bytes:
    """The content as it comes."""
    response = client.videos.with_streaming_response.download_content(id)
    if kind_of(client):
        async with response as opened:
            return b"".join([piece async for piece in opened.iter_bytes()])
    with response as opened:
        return b"".join(opened.iter_bytes())


async def list_remix_and_delete(client: Any) -> None:
    first = await got(client.videos.create_and_poll(prompt="x", poll_interval_ms=20, extra_body={"seed": 7}))
    remix = await got(client.videos.remix(first.id, prompt="y"))
    assert (remix.remixed_from_video_id, remix.prompt, remix.seed) == (first.id, "y", 7)
    assert (await got(client.videos.poll(remix.id, poll_interval_ms=20))).status == "completed"
    listed = [video.id async for video in each(await got(client.videos.list(limit=1, order="desc")))]
    assert listed[:2] == [remix.id, first.id] and len(listed) == len(set(listed))  # the pager went through all pages
    for id in (remix.id, first.id):
        deleted = await got(client.videos.delete(id))
        assert (deleted.id, deleted.deleted, deleted.object) == (id, True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            await got(client.videos.retrieve(id))
        with pytest.raises(openai.NotFoundError):
            await got(client.videos.download_content(id))


async def what_takes_videos(client: Any) -> None:
    for call in (
        lambda: client.videos.edit(prompt="x", video=b"x"),
        lambda: client.videos.extend(prompt="x", seconds="4", video=b"x"),
        lambda: client.videos.create_character(name="x", video=b"x"),
    ):
        with pytest.raises(openai.BadRequestError):
            await got(call())
    with pytest.raises(openai.NotFoundError):
        await got(client.videos.get_character("char_1"))


async def what_cannot_be(client: Any) -> None:
    for fields, param in (({"seconds": "0"}, "seconds"), ({"size": "1x1"}, "size"), ({"prompt": " "}, "prompt")):
        with pytest.raises(openai.BadRequestError) as caught:
            await got(client.videos.create(**{"prompt": "x", **fields}))
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError, match="POST /v1/videos"):
        await got(client.images.generate(prompt="x"))


VIDEOS = (create_and_poll, create_poll_and_download, list_remix_and_delete, what_takes_videos, what_cannot_be)


@pytest.mark.filterwarnings("ignore:.*Sora.*:DeprecationWarning")
@pytest.mark.parametrize("call", VIDEOS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_videos(video_server: Server, kind: str, call: Callable[..., Awaitable[None]], tmp_path: Path) -> None:
    extra = (tmp_path,) if "folder" in inspect.signature(call).parameters else ()
    use(video_server, kind, lambda client: call(client, *extra))
