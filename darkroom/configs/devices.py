"""Which devices there are, without importing torch (that takes seconds, and the server process must not)."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile

import pynvml

from .config import EngineConfig
from .errors import ConfigError

_CPU_RANKS = 64
_BACKEND_PACKAGES = {
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers",
    **dict.fromkeys(("flash_hub", "_flash_3_hub", "sage_hub"), "kernels"),
}
"""What must be importable for a kernel that does not come with torch."""


def cuda_devices() -> int:
    """How many GPUs a worker could use: 0 without a driver, or with torch's CPU build."""
    if "+cpu" in version("torch"):
        return 0
    try:
        pynvml.nvmlInit()
        present = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else _visible(visible, present)


def _visible(names: str, present: int) -> int:
    """How many devices CUDA_VISIBLE_DEVICES leaves: CUDA reads indices and UUIDs up to the first that it cannot use."""
    indices = {str(i) for i in range(present)}
    usable = (name.strip() in indices or name.strip().startswith(("GPU-", "MIG-")) for name in names.split(","))
    return sum(takewhile(bool, usable))


def resolve_device(config: EngineConfig, *, elsewhere: bool = False) -> EngineConfig:
    """The configuration with `auto` replaced by what this machine has. Raises ConfigError for too few devices.

    With `elsewhere`, a machine without any GPU may plan for one that has them.
    """
    found = cuda_devices()
    device = ("cuda" if found else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and config.world_size > found and not (elsewhere and not found):
        raise ConfigError(
            f"this configuration takes {config.world_size} GPU{'s' * (config.world_size > 1)}, and "
            + (f"{found} can be used here; lower --usp, --ring, --tp or --cfg" if found else "none can be used here")
            + ", or take --device cpu"
        )
    if device == "cpu" and config.world_size > _CPU_RANKS:
        raise ConfigError(f"{config.world_size} ranks on CPUs, where more than {_CPU_RANKS} only wait for each other")
    if not elsewhere:
        _check_backend(config.attention_backend, device)
    dtype = ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    return config.model_copy(update={"device": device, "dtype": dtype})


def _check_backend(backend: str, device: str) -> None:
    """Raises ConfigError for an attention kernel that is not installed, or not for this device."""
    if device == "cpu" and backend not in ("auto", "native", "_native_math"):
        raise ConfigError(f"--attention-backend {backend}: this kernel is for GPUs; on CPUs leave it at auto")
    package = _BACKEND_PACKAGES.get(backend)
    if package and find_spec(package) is None:
        raise ConfigError(f"--attention-backend {backend}: the package '{package}' is not installed")


def torch_threads(workers: int) -> int:
    """CPU threads for each of `workers` processes: OMP_NUM_THREADS if it is set, else an equal share of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # further numbers are for nested regions
    return int(asked) if asked.isdecimal() and int(asked) else max(1, len(os.sched_getaffinity(0)) // workers)


def worker_environment() -> dict[str, str]:
    """What the engine's processes get.

    gloo must not look for this host's public name, as all ranks are on one machine; and sets of strings must have one
    order on all ranks, whatever code walks through them: their samples would part without a word.
    """
    return {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "PYTHONHASHSEED": "0"}
