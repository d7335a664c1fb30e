"""An engine process that is ended before, or instead of, being ready; tests/engine/test_engine.py has the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from darkroom.configs.errors import ConfigError
from darkroom.engine import launch
from darkroom.engine.launch import EngineProcess
from darkroom.models.checkpoint import DEMO
from tests.engine.peer import config, eventually, have_gone, sockets, tree


def test_an_engine_that_is_stopped_while_starting_leaves_nothing() -> None:
    with EngineProcess(config("demo")) as engine:
        assert engine.address == f"ipc://{engine.run_dir}/engine"
        assert engine.run_dir.stat().st_mode & 0o077 == 0
        assert eventually(lambda: len(sockets(engine.run_dir)) > 1)
        processes = tree(engine.process.pid)
    assert not engine.run_dir.exists()
    assert have_gone(processes)
    engine.stop()  # a second time does nothing


def test_an_engine_that_does_not_obey_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_STOP_SECONDS", 0.2)
    engine = EngineProcess(config("demo"))
    psutil.Process(engine.process.pid).suspend()
    engine.stop()
    assert engine.process.returncode == -9
    assert not engine.run_dir.exists()


def test_an_engine_that_has_died_can_be_stopped() -> None:
    engine = EngineProcess(config("demo"))
    engine.process.kill()
    engine.process.wait()
    engine.stop()
    assert not engine.run_dir.exists()


def test_the_engine_process_needs_no_torch() -> None:
    """It would take seconds to start, and half a gigabyte."""
    script = "import sys, darkroom.engine.engine, darkroom.engine.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(DEMO).parent, check=False).returncode == 0


def test_no_code_is_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("msgspec.py", "torch.py", "queue.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'taken')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    with EngineProcess(config("demo")) as engine:
        assert eventually(lambda: len(sockets(engine.run_dir)) > 1)
    assert not (tmp_path / "taken").exists()


def test_a_temporary_folder_too_deep_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="too long for sockets"):
        EngineProcess(config("demo"))
    assert list(deep.iterdir()) == []
    monkeypatch.setattr("tempfile.tempdir", str(deep / "none"))
    with pytest.raises(ConfigError, match="no temporary folder"):
        EngineProcess(config("demo"))
