"""What a request must pass before anything of its body is read: a key, the server's end, the limits."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from darkroom.configs.operations import OperationsConfig

from .drain import Drain
from .keys import Keys
from .limits import RateLimits, network
from .trail import KEY, Trail

_READING = ("GET", "HEAD", "OPTIONS")
"""Methods that ask for no work: not limited, and answered while the server drains."""


class Guard:
    """Everything under /v1 is guarded, and so are the pages that the operator protects. Raises `ApiError`."""

    def __init__(self, app: ASGIApp, config: OperationsConfig, keys: Keys, drain: Drain) -> None:
        self.app = app
        self.root = config.root_path
        self.keys = keys
        self.limits = RateLimits(config.rate_limit, config.max_concurrent_per_key)
        self.drain = drain
        pages = {"/metrics": config.protect_metrics, "/openapi.json": config.protect_docs}
        self.protected = {page for page, is_protected in pages.items() if is_protected}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = self._route_path(scope)
        is_api = path.startswith("/v1/")
        trail: Trail = scope[KEY]
        if is_api or path in self.protected:
            trail.owner = self.keys.owner(scope["headers"])
        if not is_api:
            await self.app(scope, receive, send)
        elif scope["method"] in _READING:
            with self.drain.work():
                await self.app(scope, receive, send)
        else:
            self.drain.refuse()
            client = scope["client"] or ("",)  # None of one that has gone already
            with self.limits.admit(trail.owner or network(client[0])), self.drain.work():
                await self.app(scope, receive, send)

    def _route_path(self, scope: Scope) -> str:
        """What the router will match, whether or not the proxy has cut off its prefix: it cannot see another path."""
        path: str = scope["path"]
        if self.root and f"{path}/".startswith(f"{self.root}/"):
            path = path[len(self.root) :]
        scope["root_path"], scope["path"] = self.root, self.root + path
        return path
