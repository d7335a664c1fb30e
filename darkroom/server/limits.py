"""How often, and how much at a time, one client may ask for work. A refusal says when to come again."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .errors import too_many

_SECONDS = {"second": 1.0, "minute": 60.0, "hour": 3600.0}
_MOST_CLIENTS = 50_000
"""Those of whom something is remembered; beyond them, the one that has asked least recently is forgotten."""


@dataclass
class _Client:
    asked: deque[float] = field(default_factory=deque)
    """When, within the last period."""
    running: deque[float] = field(default_factory=deque)
    """When those began that have not ended."""


class RateLimits:
    """For each client no more than `rate` requests in any period, and `concurrent` at one time. None is no limit.

    `clock` tells seconds.
    """

    def __init__(
        self,
        rate: str | None = None,
        concurrent: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        number, _, unit = (rate or "0/second").partition("/")
        self.most = int(number) or None
        self.period = _SECONDS[unit]
        self.unit = unit
        self.concurrent = concurrent
        self._clock = clock
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._usual: float | None = None
        """Seconds that a request took of late."""

    @contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Around one request of this client's. Raises `ApiError` 429."""
        if self.most is None and self.concurrent is None:
            yield
            return
        now = self._clock()
        known = self._known(client)
        self._check_concurrency(known, now)
        self._check_rate(known, now)
        known.running.append(now)
        try:
            yield
            self._learn(self._clock() - now)  # but not from what fails, which is mostly at once
        finally:
            known.running.remove(now)

    def _known(self, client: str) -> _Client:
        known = self._clients.setdefault(client, _Client())
        self._clients.move_to_end(client)
        if len(self._clients) > _MOST_CLIENTS:
            idle = (name for name, one in self._clients.items() if not one.running)
            self._clients.pop(next(idle, ""), None)
        return known

    def _check_rate(self, client: _Client, now: float) -> None:
        if self.most is None:
            return
        while client.asked and client.asked[0] <= now - self.period:
            client.asked.popleft()
        if len(client.asked) >= self.most:
            message = f"The limit is {self.most} requests per {self.unit}."
            raise too_many(message, client.asked[0] + self.period - now)
        client.asked.append(now)

    def _check_concurrency(self, client: _Client, now: float) -> None:
        if self.concurrent is not None and len(client.running) >= self.concurrent:
            message = f"The limit is {self.concurrent} requests at one time, and as many are running."
            raise too_many(message, (self._usual or 1.0) - (now - client.running[0]))

    def _learn(self, seconds: float) -> None:
        self._usual = seconds if self._usual is None else 0.8 * self._usual + 0.2 * seconds


def network(address: str) -> str:
    """Whom an address stands for: an IPv6 host has a whole /64 to choose from."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else address
