"""CUDA is looked for without torch; what NVML would find is set here, for no test machine has it all."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pynvml
import pytest

from darkroom.configs import ConfigError, EngineConfig
from darkroom.configs import devices as module
from darkroom.configs.devices import cuda_devices, resolve_device, torch_threads, worker_environment


def gpus(patch: pytest.MonkeyPatch, present: int, visible: str | None = None, torch: str = "2.13.0+cu130") -> None:
    patch.setattr(module, "version", lambda _: torch)
    patch.setattr(pynvml, "nvmlInit", lambda: None)
    patch.setattr(pynvml, "nvmlDeviceGetCount", lambda: present)
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        patch.setenv("CUDA_VISIBLE_DEVICES", visible)


def config(**values: Any) -> EngineConfig:
    return EngineConfig.check({"model": "demo", **values})


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0,1", 2),
        ("3, 2", 2),
        ("0,-1,1", 1),  # CUDA reads up to the first that is none
        ("0,1,2,3,4,5", 4),
        ("7", 0),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("MIG-e1d5bd1a-d3bf-5b87-a3e9-a63ad1b39ee2,GPU-8932f937", 2),
        ("none", 0),
    ],
)
def test_cuda_visible_devices_is_heeded(visible: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, present=4, visible=visible)
    assert cuda_devices() == expected


def test_torch_for_cpus_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, present=4, torch="2.13.0+cpu")
    assert cuda_devices() == 0


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, present=4)

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert cuda_devices() == 0


@pytest.mark.parametrize(
    ("present", "values", "device", "dtype"),
    [
        (0, {}, "cpu", "float32"),
        (0, {"usp": 4}, "cpu", "float32"),
        (0, {"dtype": "bfloat16"}, "cpu", "bfloat16"),
        (1, {}, "cuda", "bfloat16"),
        (1, {"dtype": "float16"}, "cuda", "float16"),
        (1, {"device": "cpu", "tp": 4}, "cpu", "float32"),
        (4, {"usp": 2, "ring": 2}, "cuda", "bfloat16"),
        (4, {"device": "cuda", "tp": 4}, "cuda", "bfloat16"),
    ],
)
def test_auto_takes_what_there_is(
    present: int, values: dict[str, Any], device: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, present)
    resolved = resolve_device(config(**values))
    assert (resolved.device, resolved.dtype) == (device, dtype)
    assert resolved.axes == config(**values).axes


@pytest.mark.parametrize(
    ("present", "values", "message"),
    [
        (0, {"device": "cuda"}, "takes 1 GPU, and none can be used here, or take --device cpu"),
        (1, {"tp": 2}, "takes 2 GPUs, and 1 can be used here; lower --usp, --ring, --tp or --cfg"),
        (4, {"usp": 2, "ring": 2, "cfg": 2}, "takes 8 GPUs, and 4 can be used here"),
    ],
)
def test_more_ranks_than_devices(
    present: int, values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, present)
    with pytest.raises(ConfigError, match=message):
        resolve_device(config(**values))


def test_a_machine_without_gpus_may_plan_for_one_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, present=0)
    assert resolve_device(config(device="cuda", tp=8), elsewhere=True).dtype == "bfloat16"
    gpus(monkeypatch, present=2)
    with pytest.raises(ConfigError, match="takes 8 GPUs, and 2 can be used here"):
        resolve_device(config(device="cuda", tp=8), elsewhere=True)


def test_threads_share_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert torch_threads(1) == len(os.sched_getaffinity(0))
    assert torch_threads(10_000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert torch_threads(10_000) == 3


def test_gloo_talks_over_the_loopback_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert worker_environment()["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert worker_environment()["GLOO_SOCKET_IFNAME"] == "eth0"


def test_all_ranks_order_sets_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    code = "print({'it', 'does', 'not', 'move'})"
    runs = [subprocess.check_output([sys.executable, "-c", code], env=worker_environment()) for _ in range(4)]
    assert len(set(runs)) == 1


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash", "this kernel is for GPUs"),
        ("_native_cudnn", "this kernel is for GPUs"),
        ("sage_hub", "this kernel is for GPUs"),
    ],
)
def test_a_kernel_that_this_machine_cannot_run(backend: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cuda_devices", lambda: 0)
    config = EngineConfig.model_validate({"model": "demo", "attention_backend": backend})
    with pytest.raises(ConfigError, match=message):
        module.resolve_device(config)
    module.resolve_device(config, elsewhere=True)


def test_a_kernel_whose_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cuda_devices", lambda: 1)
    config = EngineConfig.model_validate({"model": "demo", "attention_backend": "flash"})
    with pytest.raises(ConfigError, match="the package 'flash_attn' is not installed"):
        module.resolve_device(config)
