"""One process per device: obeys the engine's commands. All ranks run this same code on the same commands."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import zmq

from darkroom.configs.config import EngineConfig
from darkroom.configs.devices import torch_threads
from darkroom.configs.errors import ConfigError
from darkroom.configs.request import Request
from darkroom.models import Model, Sample
from darkroom.models.build import build
from darkroom.models.checkpoint import open_checkpoint
from darkroom.parallel.guidance import map_branches
from darkroom.parallel.mesh import Mesh

from .media import encode_files, encode_preview
from .messages import (
    Command,
    Decode,
    Done,
    Drop,
    Encoded,
    EncodingFailed,
    Error,
    Exit,
    FromEncoder,
    Loaded,
    Prepare,
    Prepared,
    Refusal,
    Reply,
    Step,
    decode_command,
    encode,
)

logger = logging.getLogger(__name__)


class Worker:
    """This rank's model and the samples in flight. Knows no sockets."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.samples: dict[str, Sample] = {}
        self.last_step: torch.cuda.Event | None = None

    def execute(self, command: Command) -> tuple[Prepared, ...]:
        """Do any command but `Decode`. Call in inference mode."""
        match command:
            case Prepare(ids=ids, requests=requests):
                return tuple(self._prepare(id, request) for id, request in zip(ids, requests, strict=True))
            case Step(ids=ids):
                self._wait_for_last_step()
                self.step([self.samples[id] for id in ids])
                self._mark_step()
            case Drop(ids=ids):
                for id in ids:
                    if sample := self.samples.pop(id, None):
                        self.model.drop(sample)
        return ()

    def step(self, samples: Sequence[Sample]) -> None:
        """One denoising step of samples that can share a batch: equal sizes, equal numbers of branches."""
        branches = range(len(samples[0].branches))
        predictions = map_branches(lambda branch: self.model.predict(samples, branch), branches, self.model.mesh.cfg)
        for i, sample in enumerate(samples):
            self.model.advance(sample, self.model.guide(sample, [x[i : i + 1] for x in predictions]))

    def decode(self, command: Decode) -> torch.Tensor | None:
        """Pictures [B, ...] in [-1, 1] on the output rank, None on the others."""
        samples = [self.samples[id] for id in command.ids]
        latents = [s.latents if command.preview is None or s.estimate is None else s.estimate for s in samples]
        return self.model.decode(samples, latents)

    def _prepare(self, id: str, request: Request) -> Prepared:
        sample = self.model.prepare(request)
        self.samples[id] = sample
        return Prepared(
            num_steps=sample.num_steps,
            text_tokens=sample.text_tokens,
            image_tokens=sample.image_tokens,
            input_image_tokens=sample.input_image_tokens,
        )

    def _wait_for_last_step(self) -> None:
        """Run at most one step ahead of the GPU: it never waits for Python, and a cancel takes effect in a step."""
        if self.last_step is not None:
            self.last_step.synchronize()

    def _mark_step(self) -> None:
        if self.model.device.type == "cuda":
            self.last_step = torch.cuda.Event(blocking=True)  # waits without spinning on a core
            self.last_step.record()


class WorkerProcess:
    """A `Worker` on the wire: commands in, one reply to each out, pictures through the encoder thread."""

    def __init__(self, rank: int, addresses: tuple[str, str]) -> None:
        self.rank = rank
        self.context = zmq.Context()
        self.commands = self._connect(zmq.PULL, addresses[0])
        self.replies = self._connect(zmq.PUSH, addresses[1])
        self.encoded = self._connect(zmq.PUSH, addresses[1])  # sockets are not thread-safe: this is the encoder's
        self.encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    def _connect(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.set_hwm(0)  # the default high-water mark drops or blocks silently; the engine bounds its own queue
        socket.connect(address)
        return socket

    def run(self, config: EngineConfig, rendezvous: Path) -> None:
        self._serve(config, rendezvous)
        self.context.destroy(linger=1000)  # let the last reply out, but do not wait for an engine that has gone

    def _serve(self, config: EngineConfig, rendezvous: Path) -> None:
        try:
            worker = Worker(_load(config, self.rank, rendezvous))
        except Exception as e:
            logger.log(logging.DEBUG if isinstance(e, ConfigError) else logging.ERROR, "loading failed", exc_info=True)
            self._send(Error(rank=self.rank, error=str(e), is_config_error=isinstance(e, ConfigError)))
            return
        self._send(Loaded(rank=self.rank))
        with torch.inference_mode():
            while not isinstance(command := decode_command(self.commands.recv()), Exit):
                self._send(self._obey(worker, command))
        self.encoder.shutdown(cancel_futures=True)

    def _obey(self, worker: Worker, command: Command) -> Reply:
        try:
            if isinstance(command, Decode):
                self._encode(worker, command, worker.decode(command))
                _wait_for_device(worker.model.device)  # the time is the decode's, and the encoder finds it done
                return Done(rank=self.rank)
            return Done(rank=self.rank, prepared=worker.execute(command))
        except torch.AcceleratorError:
            logger.exception("the device is lost to rank %d", self.rank)
            os._exit(1)  # every later call would fail too: the engine starts another process
        except Exception as e:
            if not (refusal := Refusal.of(e)):
                logger.exception("%s failed on rank %d", type(command).__name__, self.rank)
            return Error(rank=self.rank, error=f"{type(e).__name__}: {e}", refusal=refusal)

    def _encode(self, worker: Worker, command: Decode, decoded: torch.Tensor | None) -> None:
        if decoded is None:
            return
        samples = [worker.samples[id] for id in command.ids]
        for id, sample, picture in zip(command.ids, samples, decoded, strict=True):
            self.encoder.submit(self._encode_one, worker.model, id, sample.request, picture, command.preview)

    def _encode_one(self, model: Model, id: str, request: Request, picture: torch.Tensor, preview: int | None) -> None:
        start = time.monotonic()
        message: FromEncoder
        try:
            pictures = model.pictures(picture[None])
            files = encode_files(pictures, request) if preview is None else (encode_preview(pictures, request),)
            message = Encoded(id=id, files=files, seconds=time.monotonic() - start, preview=preview)
        except Exception as e:
            logger.exception("encoding failed")
            message = EncodingFailed(id=id, error=f"{type(e).__name__}: {e}")
        self.encoded.send(encode(message))

    def _send(self, reply: Reply) -> None:
        self.replies.send(encode(reply))


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _load(config: EngineConfig, rank: int, rendezvous: Path) -> Model:
    device = torch.device("cuda", rank) if config.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(torch_threads(config.world_size))
    if config.dtype == "float32":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # TF32, the default, would be another picture than a CPU's
    if config.world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(str(rendezvous), config.world_size),
            rank=rank,
            world_size=config.world_size,
            device_id=device if device.type == "cuda" else None,
        )
    dtype: torch.dtype = getattr(torch, config.dtype)
    mesh = Mesh(config, rank)
    mesh.connect(device)
    return build(open_checkpoint(config), config, mesh, device, dtype)


def run_worker(config: EngineConfig, rank: int, addresses: tuple[str, str], rendezvous: Path) -> None:
    WorkerProcess(rank, addresses).run(config, rendezvous)
