"""The Idempotency-Key header: a request that is sent once more with the same one is answered with the same work."""

from __future__ import annotations

import hashlib
from typing import TypeVar

from starlette.requests import Request

from darkroom.configs.errors import RequestError

from .parameters import Parameters
from .trail import trail_of

P = TypeVar("P", bound=Parameters)

HEADER = "Idempotency-Key"
LONGEST = 255


def idempotency_key(http: Request) -> str | None:
    """The key, hashed together with whose it is: 64 hexadecimal digits. Raises `RequestError`."""
    key = http.headers.get(HEADER)
    if key is None:
        return None
    if not 0 < len(key) <= LONGEST:
        raise RequestError(f"'{HEADER}' should have 1 to {LONGEST} characters, not {len(key)}.", param=HEADER)
    return hashlib.sha256(f"{trail_of(http).owner or ''}\n{key}".encode()).hexdigest()


def seeded(asked: P, key: str | None) -> P:
    """The request, of which nothing is left to chance: without a seed of its own it has one that comes of the key."""
    if key is None or asked.seed is not None:
        return asked
    return asked.model_copy(update={"seed": int(key[:8], 16)})
