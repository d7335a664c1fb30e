"""What the operator chose and what a request is. No torch, no sockets."""

from .capabilities import Capabilities
from .config import CheckConfig, EngineConfig, GenerateConfig, ServeConfig
from .errors import ConfigError, RequestError
from .parallel import ParallelConfig
from .request import Request, SamplingParams

__all__ = [
    "Capabilities",
    "CheckConfig",
    "ConfigError",
    "EngineConfig",
    "GenerateConfig",
    "ParallelConfig",
    "Request",
    "RequestError",
    "SamplingParams",
    "ServeConfig",
]
