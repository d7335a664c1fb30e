"""The engine process as the server sees it: over its socket, with real workers, which are killed and stopped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from darkroom.engine.launch import EngineProcess
from darkroom.engine.messages import Cancel, Failed, Finished, Ping, Preview, Progress, Status
from tests.engine.peer import Peer, config, eventually, have_gone, sockets, tree, workers
from tests.golden import picture_file, request

LONG = request(num_inference_steps=200)
"""Seconds of work, of which a test sees the beginning."""
TOO_LARGE = request(width=2**20, height=2**20)
"""Never let through by the server; every rank refuses to draw that much noise."""


@pytest.fixture(scope="module")
def one() -> Iterator[EngineProcess]:
    with EngineProcess(config("demo", max_queue=3)) as engine:
        yield engine


@pytest.fixture(scope="module")
def one_peer(one: EngineProcess) -> Iterator[Peer]:
    with Peer(one.address) as peer:
        yield peer


@pytest.fixture
def peer(one_peer: Peer) -> Peer:
    """Of an engine with one worker that is ready and has nothing to do."""
    assert eventually(lambda: one_peer.status("ready").running == 0)
    return one_peer


# ---- one worker ----------------------------------------------------------------------------------------------------


def test_the_engine_tells_of_every_change_until_it_is_ready(one: EngineProcess, one_peer: Peer) -> None:
    one_peer.send(Ping())
    states = []
    while not states or states[-1] != "ready":
        message = one_peer.receive()
        assert isinstance(message, Status)
        states.append(message.state)
    assert states in (["starting", "ready"], ["ready"])


def test_no_socket_file_is_left_once_all_are_connected(one: EngineProcess, peer: Peer) -> None:
    assert one.run_dir.stat().st_mode & 0o077 == 0
    assert sockets(one.run_dir) == []


def test_one_picture(peer: Peer) -> None:
    peer.generate(a=request(num_inference_steps=4, partial_images=3, seed=5, output_format="webp"))
    events = list(peer.events("a"))
    steps = [event for event in events if isinstance(event, Progress)]
    assert [(event.step, event.num_steps, event.batch_size) for event in steps] == [(i, 4, 1) for i in (1, 2, 3, 4)]
    previews = [event for event in events if isinstance(event, Preview)]
    assert [event.index for event in previews] == [0, 1, 2]
    [finished] = [event for event in events if isinstance(event, Finished)]
    assert finished is events[-1]
    assert (finished.seed, finished.image_tokens) == (5, 35)
    assert set(finished.stages) == {"queue", "prepare", "denoise", "decode", "encode"}
    assert all(seconds >= 0 for seconds in finished.stages.values())
    images = [*(event.image for event in previews), finished.files[0]]
    assert all(image.startswith(b"RIFF") for image in images)
    assert len(set(images)) == 4


def test_requests_are_interleaved_and_equal_requests_give_equal_pictures(peer: Peer) -> None:
    wanted = {"a": request(seed=1), "b": request("a dog", seed=2), "c": request(seed=1)}
    peer.generate(**wanted)
    events = list(peer.events(*wanted))
    images = {event.id: event.files[0] for event in events if isinstance(event, Finished)}
    assert images["a"] == images["c"] != images["b"]
    assert eventually(lambda: peer.status().running == 0)
    peer.generate(d=wanted["a"])
    [alone] = peer.endings("d").values()
    assert isinstance(alone, Finished)
    assert alone.files[0] == images["a"]


def test_a_short_request_overtakes_a_long_one(peer: Peer) -> None:
    peer.generate(long=LONG)
    peer.first_progress("long")
    peer.generate(short=request(num_inference_steps=2))
    assert isinstance(peer.endings("short")["short"], Finished)
    peer.send(Cancel(id="long"))


def test_a_cancelled_request_stops_within_a_step(peer: Peer) -> None:
    peer.generate(a=LONG, b=LONG)
    peer.first_progress("a", "b")
    peer.send(Cancel(id="a"))
    peer.send(Cancel(id="b"))
    assert peer.status().running == 0
    assert not peer.has_mail(0.5)


def test_a_request_cancelled_at_once_leaves_nothing(peer: Peer) -> None:
    peer.generate(a=LONG)
    peer.send(Cancel(id="a"))
    peer.send(Cancel(id="never heard of"))
    peer.generate(b=request())
    assert [type(event) for event in peer.events("b")][-1] is Finished
    assert peer.status().running == 0


def test_a_request_that_every_rank_refuses_fails_alone(peer: Peer) -> None:
    peer.generate(bad=TOO_LARGE, good=request())
    endings = peer.endings("bad", "good")
    assert isinstance(endings["good"], Finished)
    assert isinstance(failed := endings["bad"], Failed)
    assert failed.reason == "internal"
    assert peer.status().state == "ready"


def test_a_picture_that_cannot_be_decoded_is_the_clients_fault(peer: Peer) -> None:
    """Its header is fine: only the workers find out."""
    broken = picture_file(112, 80)[:-300]
    wanted = {
        "broken": request(task="image-to-image", images=(broken,), strength=0.5, num_inference_steps=4),
        "whole": request(),
    }
    peer.generate(**wanted)
    endings = peer.endings("broken", "whole")
    assert isinstance(endings["whole"], Finished)
    failed = endings["broken"]
    assert isinstance(failed, Failed) and failed.refusal is not None
    error = failed.refusal.as_error()
    assert (error.param, error.code, str(error)) == (
        "image",
        "invalid_value",
        "'image' cannot be decoded: the file is broken.",
    )


def test_a_picture_that_cannot_be_encoded_fails_alone(peer: Peer) -> None:
    """The encoder is a thread of its own; what it raises must not leave a client waiting for ever."""
    peer.generate(bad=request(output_format="webp", output_compression=101), good=request())
    endings = peer.endings("bad", "good")
    assert isinstance(endings["good"], Finished)
    assert isinstance(failed := endings["bad"], Failed)
    assert failed.reason == "internal"
    assert eventually(lambda: peer.status().running == 0)


def test_the_queue_is_bounded(peer: Peer) -> None:
    running = {f"r{i}": LONG for i in range(4)}
    for id in running:
        peer.generate(**{id: LONG})
        peer.first_progress(id)
    waiting = {f"w{i}": LONG for i in range(3)}
    peer.generate(**waiting, over=LONG)
    assert peer.endings("over")["over"] == Failed(id="over", error="3 requests are waiting already", reason="busy")
    status = peer.status()
    assert (status.waiting, status.running) == (3, 4)
    for id in (*running, *waiting):
        peer.send(Cancel(id=id))
    status = peer.status()
    assert (status.waiting, status.running) == (0, 0)


def test_a_message_that_is_none_is_ignored(peer: Peer) -> None:
    peer._socket.send(b"\xc1")
    assert peer.status().state == "ready"


def test_a_worker_dies_while_all_is_idle(one: EngineProcess, peer: Peer) -> None:
    [worker] = workers(one.process.pid)
    worker.kill()
    peer.status("restarting")
    peer.generate(a=request())
    assert isinstance(peer.endings("a")["a"], Finished)
    assert workers(one.process.pid) != [worker]
    assert sockets(one.run_dir) == []


def test_an_idle_engine_sleeps(one: EngineProcess, peer: Peer) -> None:
    def seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in tree(one.process.pid))

    before = seconds()
    assert not peer.has_mail(1.0)
    assert seconds() - before < 0.1


def test_workers_that_die_again_while_loading_are_given_up(one: EngineProcess, peer: Peer) -> None:
    """The last test with this engine."""

    def is_given_up() -> bool:
        for worker in workers(one.process.pid):
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        return peer.status().state == "failed"

    assert eventually(is_given_up)
    peer.generate(a=request())
    assert isinstance(failed := peer.endings("a")["a"], Failed)
    assert failed.reason == "unavailable"
    assert not peer.status().is_config_error


# ---- two workers, which are lost again and again -------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(checkpoints: dict[str, Path]) -> Iterator[EngineProcess]:
    with EngineProcess(config(checkpoints["qwen_image_4_heads"], tp=2, step_timeout=4.0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def two_peer(two: EngineProcess) -> Iterator[Peer]:
    with Peer(two.address) as peer:
        yield peer


IN_FLIGHT = {f"r{i}": LONG for i in range(4)}
WAITING = {f"w{i}": request(num_inference_steps=2, seed=i) for i in range(2)}


@pytest.mark.parametrize("how", ["kill", "suspend", "kill their fork server"])
def test_what_is_in_flight_fails_and_what_waits_is_done_by_new_workers(
    how: str, two: EngineProcess, two_peer: Peer
) -> None:
    two_peer.status("ready")
    two_peer.generate(**IN_FLIGHT, **WAITING)
    two_peer.first_progress(*IN_FLIGHT)
    lost = workers(two.process.pid)
    assert len(lost) == 2
    match how:
        case "kill":
            lost[1].kill()
        case "suspend":
            lost[1].suspend()
        case "kill their fork server":
            psutil.Process(lost[0].ppid()).kill()
    endings = two_peer.endings(*IN_FLIGHT, *WAITING)
    for id in IN_FLIGHT:
        assert isinstance(failed := endings[id], Failed)
        assert failed.reason == "unavailable"
    assert all(isinstance(endings[id], Finished) for id in WAITING)
    assert two_peer.status().state == "ready"
    assert have_gone(lost)


def test_a_killed_engine_takes_its_workers_along(two: EngineProcess, two_peer: Peer) -> None:
    two_peer.status("ready")
    two_peer.generate(**IN_FLIGHT)
    two_peer.first_progress(*IN_FLIGHT)
    processes = tree(two.process.pid)
    assert len(processes) >= 4  # the engine, the fork server, two workers
    two.process.kill()
    assert have_gone(processes)
    assert sockets(two.run_dir) == []


# ---- ends ----------------------------------------------------------------------------------------------------------

PARENT = """
import sys, time
from darkroom.engine.launch import EngineProcess
from tests.engine.peer import Peer, config
with EngineProcess(config("demo")) as engine, Peer(engine.address) as peer:
    print(engine.process.pid, engine.run_dir, flush=True)
    peer.status("ready")
    print("ready", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_nothing_is_left_of_a_killed_parent(when: str) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine, run_dir = parent.stdout.readline().split()
        if when == "ready":
            assert parent.stdout.readline() == "ready\n"
        else:  # the fork server is importing torch
            assert eventually(lambda: len(tree(int(engine))) > 1)
        processes = tree(int(engine))
        parent.kill()
        assert have_gone(processes)
        assert not Path(run_dir).exists()


def test_a_checkpoint_that_cannot_be_loaded(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen_image_4_heads"], tmp_path / "model"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with EngineProcess(config(folder)) as engine, Peer(engine.address) as peer:
        peer.generate(early=request())
        status = peer.status("failed")
        assert status.is_config_error
        assert "transformer/diffusion_pytorch_model.safetensors is not a whole safetensors file" in status.detail
        peer.generate(late=request())
        assert peer.endings("late")["late"] == Failed(id="late", error=status.detail, reason="unavailable")
        assert not workers(engine.process.pid)
