"""The group of worker processes: real ones, forked from this test's own fork server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from darkroom.engine import workers
from darkroom.engine.messages import Command, Decode, Drop, Encoded, Error, Prepare, Step, encode
from darkroom.engine.workers import CommandFailed, LoadFailed, WorkerGroup, WorkersLost
from tests.engine.peer import PATIENCE, config, have_gone
from tests.golden import picture_file, request


@contextmanager
def new_group(model: Path, run_dir: Path, **values: Any) -> Iterator[WorkerGroup]:
    context = zmq.Context()
    group = WorkerGroup(config(model, **values), context, run_dir)
    try:
        yield group
    finally:
        group.kill()
        context.destroy(linger=0)


@pytest.fixture(scope="module")
def shared(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerGroup]:
    with new_group(checkpoints["qwen_image_4_heads"], tmp_path_factory.mktemp("run"), tp=2) as group:
        yield group


@pytest.fixture
def group(shared: WorkerGroup) -> WorkerGroup:
    """Two ranks that are ready. A test that breaks them kills the group."""
    if not shared.ready:
        shared.start()
        wait(shared)
    return shared


def wait(group: WorkerGroup) -> None:
    """Until the command under way is done, as the engine does."""
    deadline = time.monotonic() + PATIENCE
    while not group.receive():
        assert time.monotonic() < deadline
        zmq.select(group.files, [], [], 0.1)


def run(group: WorkerGroup, *commands: Command) -> None:
    for command in commands:
        group.send(command)
        wait(group)


def prepare(*ids: str) -> Prepare:
    return Prepare(ids=ids, requests=tuple(request(num_inference_steps=2) for _ in ids))


def processes(group: WorkerGroup) -> list[psutil.Process]:
    return [psutil.Process(process.pid) for process in group.processes]


# ---- a group that is whole -----------------------------------------------------------------------------------------


def test_the_ranks_make_a_picture_as_one(group: WorkerGroup) -> None:
    run(group, prepare("a"))
    [facts] = group.prepared
    assert (facts.num_steps, facts.image_tokens) == (2, 35)
    run(group, Step(ids=("a",)), Step(ids=("a",)), Decode(ids=("a",)), Drop(ids=("a",)))
    assert group.deadline is None
    while not (encoded := list(group.take_encoded())):  # from the output rank alone, once
        assert zmq.select(group.files, [], [], PATIENCE)[0]
        group.receive()
    [picture] = encoded
    assert isinstance(picture, Encoded)
    assert picture.files[0].startswith(b"\x89PNG")


def test_a_command_that_all_ranks_refuse_leaves_the_group_whole(group: WorkerGroup) -> None:
    with pytest.raises(CommandFailed, match="KeyError: 'z'"):
        run(group, Step(ids=("z",)))
    run(group, prepare("a"), Step(ids=("a",)), Drop(ids=("a",)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_picture_that_is_cut_off_is_the_clients_fault_and_no_end_of_the_group(
    group: WorkerGroup, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On several GPUs too, where any other error ends the group."""
    monkeypatch.setattr(group, "config", group.config.model_copy(update={"device": device}))
    broken = request(task="image-to-image", images=(picture_file(112, 80)[:-300],), strength=0.5)
    with pytest.raises(CommandFailed, match="cannot be decoded") as caught:
        run(group, Prepare(ids=("a",), requests=(broken,)))
    assert caught.value.refusal and caught.value.refusal.param == "image"
    run(group, Drop(ids=("a",)), prepare("b"), Step(ids=("b",)), Drop(ids=("b",)))


def test_nothing_is_done_without_a_command(group: WorkerGroup) -> None:
    assert not group.receive()
    assert not zmq.select(group.files, [], [], 0)[0]


def test_a_command_has_a_deadline_and_an_idle_group_has_none(group: WorkerGroup) -> None:
    assert group.deadline is None
    group.send(Drop(ids=()))
    assert group.deadline is not None
    wait(group)
    assert group.deadline is None


# ---- a group that is broken ----------------------------------------------------------------------------------------


def test_a_rank_that_dies_while_idle_is_noticed_at_once(group: WorkerGroup) -> None:
    group.processes[1].kill()
    assert zmq.select(group.files, [], [], PATIENCE)[0]
    with pytest.raises(WorkersLost, match="worker 1 ended with exit code -9"):
        wait(group)
    group.kill()


def test_a_rank_that_dies_in_a_command_is_noticed_though_the_other_waits_for_it(group: WorkerGroup) -> None:
    run(group, prepare("a"))
    os.kill(group.processes[1].pid or 0, signal.SIGSTOP)
    group.send(Step(ids=("a",)))
    group.processes[1].kill()
    with pytest.raises(WorkersLost, match="worker 1 ended with exit code -9"):
        wait(group)
    group.kill()


def test_a_command_to_the_dead_is_not_waited_for(group: WorkerGroup) -> None:
    """They may die between two looks at them."""
    for process in group.processes:
        process.kill()
    assert have_gone(processes(group))
    time.sleep(0.1)  # until ZMQ has noticed too
    group.send(Step(ids=("a",)))
    with pytest.raises(WorkersLost, match="ended with exit code -9"):
        wait(group)
    group.kill()


def test_a_rank_that_hangs_misses_its_deadline(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "config", group.config.model_copy(update={"step_timeout": 1.0}))
    held = processes(group)
    held[1].suspend()
    group.send(prepare("a"))
    with pytest.raises(WorkersLost, match="rank 0, 1 did not answer in time"):  # 0 waits in a collective for 1
        wait(group)
    group.kill()
    assert have_gone(held)


def test_a_rank_that_fails_alone_breaks_the_group(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait for it in a collective, and would do so for ever."""
    monkeypatch.setattr(workers, "_ALONE", 1.0)
    run(group, prepare("a"))
    group.commands[1].send(encode(Drop(ids=("a",))))
    with pytest.raises(WorkersLost, match="rank 0 did not answer in time; rank 1 failed: KeyError: 'a'"):
        run(group, Step(ids=("a",)))
    group.kill()


def test_the_encoder_thread_has_a_deadline_too(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "config", group.config.model_copy(update={"step_timeout": 0.2}))
    group.expect_encoded(True)
    with pytest.raises(WorkersLost, match="in time"):
        wait(group)
    group.expect_encoded(False)
    assert not group.receive()


# ---- the end -------------------------------------------------------------------------------------------------------


def test_killed_workers_are_gone_and_the_group_can_start_again(group: WorkerGroup) -> None:
    held = processes(group)
    group.kill()
    assert have_gone(held)
    assert (group.processes, group.files, group.ready, group.deadline) == ([], [], False, None)
    group.start()
    wait(group)
    run(group, prepare("a"))


def test_stopped_workers_end_by_themselves(group: WorkerGroup) -> None:
    started, held = time.monotonic(), processes(group)
    group.stop(PATIENCE)
    assert time.monotonic() - started < PATIENCE
    assert have_gone(held)


# ---- models that cannot be loaded ----------------------------------------------------------------------------------


def cut_off(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def overwritten(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(b"no header" + file.read_bytes())


def wrong_config(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_head_dim": 32}))


def fewer_layers_stored(folder: Path) -> None:
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 3}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_off, "vae/diffusion_pytorch_model.safetensors is not a whole safetensors file"),
        (overwritten, "text_encoder/model.safetensors is not a whole safetensors file"),
        (wrong_config, "config.json does not fit the weights"),
        (fewer_layers_stored, r"the checkpoint has no 'transformer_blocks\.2\."),
    ],
)
def test_a_spoilt_checkpoint_is_the_operators_to_mend(
    spoil: Callable[[Path], None], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen_image_4_heads"], tmp_path / "model"))
    spoil(folder)
    with new_group(folder, tmp_path, tp=2) as group:
        group.start()
        with pytest.raises(LoadFailed, match=message) as caught:
            wait(group)
        assert caught.value.is_config_error
        assert not group.ready


def test_the_operators_fault_is_told_before_what_it_led_to(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with new_group(checkpoints["qwen_image_4_heads"], tmp_path, tp=2) as group:
        group.start()
        group.awaited[0] = Error(rank=0, error="connection closed by peer")
        group.awaited[1] = Error(rank=1, error="no such file", is_config_error=True)
        with pytest.raises(LoadFailed, match="no such file") as caught:
            group.receive()
        assert caught.value.is_config_error


def test_a_rank_that_dies_while_loading_is_noticed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with new_group(checkpoints["qwen_image_4_heads"], tmp_path, tp=2) as group:
        group.start()
        group.processes[1].kill()
        with pytest.raises(WorkersLost, match="worker 1 ended with exit code -9") as caught:
            wait(group)
        assert not isinstance(caught.value, LoadFailed)
