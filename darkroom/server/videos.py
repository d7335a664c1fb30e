"""/v1/videos: OpenAI's video jobs. A job is accepted at once, and asked after until it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError

from . import document
from .body import JSON_WITH_PICTURES, media_type, read_json, share_of, validate
from .body import unsupported as unsupported_type
from .context import Shared
from .errors import ApiError
from .form import Form, parse_object, read_form
from .idempotency import idempotency_key, seeded
from .jobs import Job, Status, is_id
from .models import check_model
from .ranges import file_response
from .runner import VideoRunner
from .trail import trail_of
from .uploads import Sent, Source, referenced, take
from .video_request import REFERENCE, Remix, VideoRequest, check_task
from .video_stores import Variant, file_name

router = APIRouter()

_PAGE = 20
_MAX_PAGE = 100
_POLL_MS = 1000
_LIST: dict[str, document.Schema] = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 0, "maximum": _MAX_PAGE, "default": _PAGE},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
}
_MEDIA_TYPES: dict[Variant, str] = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}


@dataclass(frozen=True)
class VideoError:
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Video:
    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: str | None
    error: VideoError | None
    num_frames: int
    fps: int
    seed: int

    @classmethod
    def of(cls, job: Job) -> Video:
        request = job.outline()
        return cls(
            id=job.id,
            model=job.model,
            status=job.status,
            progress=job.progress,
            created_at=job.created_at,
            completed_at=job.completed_at,
            expires_at=job.expires_at,
            prompt=request.prompt,
            size=f"{request.width}x{request.height}",
            seconds=job.seconds,
            remixed_from_video_id=job.remixed_from,
            error=VideoError(job.error_code, job.error_message or "") if job.error_code else None,
            num_frames=request.num_frames,
            fps=request.fps,
            seed=request.seed,
        )


@dataclass(frozen=True, kw_only=True)
class VideoList:  # for the document
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


@dataclass(frozen=True, kw_only=True)
class DeletedVideo:
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


async def _runner(context: Shared) -> VideoRunner:
    """Raises `ApiError` for a model that makes no videos."""
    if context.videos is None:
        tasks = ", ".join(context.capabilities.tasks)
        raise ApiError(400, f"'{context.served_name}' makes no videos; it does {tasks}.", param="model")
    return context.videos


Runner = Annotated[VideoRunner, Depends(_runner)]


@router.post(
    "/v1/videos",
    openapi_extra=document.body(
        form=document.form_schema(VideoRequest, (REFERENCE,)), json=VideoRequest.model_json_schema()
    ),
)
async def create_video(http: HttpRequest, context: Shared, runner: Runner) -> Video:
    key = idempotency_key(http)
    body, is_form = await _read(http, context.limits)
    file = body.pop(REFERENCE) if isinstance(body.get(REFERENCE), bytes) else None
    asked = seeded(VideoRequest.read(body, is_form=is_form), key)
    check_model(asked.model, context)
    sent = _sent(asked.input_reference if file is None else file)
    check_task(context.capabilities, has_picture=bool(sent.images))
    pictures = await take(sent, context.fetcher, context.limits, share_of(http))
    picture = next(iter(pictures.images), None)
    made = asked.resolve(context.capabilities, picture)
    if picture is not None:
        await context.decoder.check_whole(picture, REFERENCE)
    new = Job.new(made.request, model=context.served_name, seconds=made.seconds, idempotency_key=key)
    return await _submit(http, runner, *new)


@router.get("/v1/videos", response_model=VideoList, openapi_extra=document.query(**_LIST))
async def list_videos(http: HttpRequest, runner: Runner) -> Response:
    """Newest first. The cursor `after` is a video's id."""
    query = http.query_params
    after, limit, order = query.get("after"), _limit(query.get("limit")), query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"Invalid order '{order[:40]}': expected 'asc' or 'desc'.", param="order")
    if after is not None and not is_id(after):
        raise _not_found(after, param="after")
    jobs = await runner.jobs.page(after=after, limit=limit + 1, newest_first=order == "desc")
    return StreamingResponse(_page(jobs, limit), media_type="application/json")


@router.post("/v1/videos/edits")
@router.post("/v1/videos/extensions")
@router.post("/v1/videos/characters")
async def unsupported(http: HttpRequest, context: Shared, runner: Runner) -> Response:
    """These take videos, which no model here does."""
    path = http.scope["path"]
    message = f"{path} is not supported: '{context.served_name}' takes no videos. See POST /v1/videos."
    raise ApiError(400, message, code="unsupported_operation")


@router.get("/v1/videos/characters/{id}")
async def get_character(id: str, runner: Runner) -> Response:
    raise ApiError(404, f"There is no character '{id[:80]}': this server makes none.", param="id")


@router.get("/v1/videos/{id}")
async def get_video(id: str, runner: Runner, response: Response) -> Video:
    job = await _job(id, runner)
    if job.status in ("queued", "in_progress"):
        response.headers["openai-poll-after-ms"] = str(_POLL_MS)
    return Video.of(job)


@router.delete("/v1/videos/{id}")
async def delete_video(id: str, runner: Runner) -> DeletedVideo:
    """Cancels what is still to be made."""
    if not await runner.delete(await _job(id, runner)):
        raise _not_found(id)
    return DeletedVideo(id=id)


@router.get(
    "/v1/videos/{id}/content",
    response_class=Response,
    responses={200: {"content": {kind: {} for kind in _MEDIA_TYPES.values()}}, 206: {"description": "A part of it."}},
    openapi_extra=document.query(variant={"enum": list(_MEDIA_TYPES), "default": "video"}),
)
async def get_content(id: str, http: HttpRequest, runner: Runner) -> Response:
    """`variant` is video, thumbnail or spritesheet."""
    variant = http.query_params.get("variant", "video")
    if variant not in get_args(Variant):
        message = f"Invalid variant '{variant[:40]}': expected one of {', '.join(get_args(Variant))}."
        raise RequestError(message, param="variant")
    job = await _job(id, runner)
    if job.status != "completed":
        raise ApiError(404, f"The video '{id}' has no content: it is {job.status}.", code="video_not_completed")
    return await _content(http, runner, job, variant)  # type: ignore[arg-type]


@router.post(
    "/v1/videos/{id}/remix",
    openapi_extra=document.body(json=Remix.model_json_schema(), form=Remix.model_json_schema()),
)
async def remix_video(id: str, http: HttpRequest, context: Shared, runner: Runner) -> Video:
    """The same video with another prompt: its seed, size, length and picture stay."""
    key = idempotency_key(http)
    source = await _job(id, runner)
    body, _ = await _read(http, context.limits)
    remix = validate(Remix, body)
    if source.model != context.served_name:
        message = f"The video was made by '{source.model}'; this server serves '{context.served_name}'."
        raise ApiError(400, message, param="id")
    request = remix.resolve(await runner.request_of(source), context.capabilities)
    new = Job.new(request, model=source.model, seconds=source.seconds, remixed_from=source.id, idempotency_key=key)
    return await _submit(http, runner, *new)


def makes_videos(capabilities: Capabilities) -> bool:
    return any(task.endswith("-to-video") for task in capabilities.tasks)


async def _submit(http: HttpRequest, runner: VideoRunner, job: Job, picture: bytes | None) -> Video:
    accepted = await runner.submit(job, picture)
    trail = trail_of(http)
    trail.asked, trail.video = job.read_request(), accepted.id  # what was accepted another version may have written
    return Video.of(accepted)


async def _read(http: HttpRequest, limits: Limits) -> tuple[dict[str, Any], bool]:
    """The body, and whether it is a form's."""
    match media_type(http):
        case "application/json":
            return await read_json(http, min(JSON_WITH_PICTURES, limits.max_upload_mb << 20)), False
        case "multipart/form-data":
            return _once(await read_form(http, (REFERENCE,), limits)), True
        case _:
            raise unsupported_type(http, "'multipart/form-data' or 'application/json'")


def _once(form: Form) -> dict[str, Any]:
    """A form of which every field may come once, files among them. Raises `RequestError`."""
    if twice := [name for name, parts in form.files.items() if len(parts) > 1 or name in form.values]:
        raise RequestError(f"The form has '{twice[0]}' more than once.", param=twice[0])
    return {**form.values, **{name: _as_sent(data, name) for name, [data] in form.files.items()}}


def _as_sent(data: bytes, name: str) -> bytes | dict[str, Any]:
    """A picture's file, or JSON that says where the picture is: no picture begins as that does."""
    return parse_object(data.decode(errors="replace"), name) if data.startswith(b"{") else data


def _sent(picture: bytes | dict[str, Any] | None) -> Sent:
    """What the video begins with. Raises `RequestError`."""
    if picture is None:
        return Sent()
    return Sent((Source(REFERENCE, picture) if isinstance(picture, bytes) else referenced(picture, REFERENCE),))


async def _job(id: str, runner: VideoRunner) -> Job:
    if (job := await runner.jobs.get(id)) is None:
        raise _not_found(id)
    return job


def _not_found(id: str, param: str = "id") -> ApiError:
    return ApiError(404, f"There is no video '{id[:80]}'.", param=param, code="video_not_found")


async def _content(http: HttpRequest, runner: VideoRunner, job: Job, variant: Variant) -> Response:
    try:
        return await file_response(http, runner.files, file_name(job, variant), _MEDIA_TYPES[variant])
    except FileNotFoundError:  # deleted a moment ago; or the folder of a server that shares the database, not the files
        raise ApiError(404, f"The files of the video '{job.id}' are gone.", code="video_not_found") from None


def _limit(text: str | None) -> int:
    if text is None:
        return _PAGE
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= _MAX_PAGE):
        raise RequestError(f"Invalid limit '{text[:40]}': expected 0 to {_MAX_PAGE}.", param="limit")
    return int(text)


async def _page(jobs: Sequence[Job], limit: int) -> AsyncIterator[bytes]:
    """A `VideoList` of one job more than the page has, if there are so many.

    With a turn for others after each video: prompts may be long, and a hundred of them kept the event loop for 100 ms.
    """
    shown = jobs[:limit]
    ends = {"first_id": shown[0].id, "last_id": shown[-1].id} if shown else {"first_id": None, "last_id": None}
    yield b'{"object":"list","data":['
    for i, job in enumerate(shown):
        yield (b"," if i else b"") + msgspec.json.encode(Video.of(job))
        await asyncio.sleep(0)
    yield b"]," + msgspec.json.encode({**ends, "has_more": limit > 0 and len(jobs) > limit})[1:]
