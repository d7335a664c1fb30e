"""Which devices there are, without importing torch (that takes seconds, and the server process must not)."""

from __future__ import annotations

import os
from importlib.metadata import version

import pynvml

from .config import EngineConfig
from .errors import ConfigError


def cuda_devices() -> int:
    """How many GPUs a worker could use: 0 without a driver, or with torch's CPU build."""
    if "+cpu" in version("torch"):
        return 0
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def resolve_device(config: EngineConfig) -> EngineConfig:
    """The configuration with `auto` replaced by what this machine has. Raises ConfigError for too few devices."""
    found = cuda_devices()
    device = ("cuda" if found else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and config.world_size > found:
        raise ConfigError(
            f"this configuration takes {config.world_size} GPUs, and "
            + (f"{found} can be used here; lower --usp, --ring, --tp or --cfg" if found else "none can be used here")
            + ", or take --device cpu"
        )
    dtype = ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    return config.model_copy(update={"device": device, "dtype": dtype})


def worker_environment() -> dict[str, str]:
    """What the engine's processes get: gloo must not look for this host's public name, all ranks are on one machine."""
    return {"GLOO_SOCKET_IFNAME": "lo", **os.environ}
