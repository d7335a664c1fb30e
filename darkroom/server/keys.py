"""API keys: which there are, and whose a request shows. Only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from darkroom.configs.errors import ConfigError
from darkroom.configs.operations import OperationsConfig

from .errors import ApiError

Headers = list[tuple[bytes, bytes]]

_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}) sha256:([0-9a-f]{64})")
_LEAST_LENGTH = 16
"""Of a key in a file: it is hashed once, which protects only what cannot be guessed."""


class Keys:
    """Names of keys by their hashes. Without any, everyone may ask."""

    def __init__(self, names: dict[bytes, str]) -> None:
        self.names = names

    @classmethod
    def read(cls, config: OperationsConfig) -> Keys:
        """Raises `ConfigError`, which shows no key."""
        names = _read_file(config.api_key_file) if config.api_key_file else {}
        for number, secret in enumerate(config.api_key, 1):
            names.setdefault(
                _digest(_checked(secret.get_secret_value(), "--api-key or DARKROOM_API_KEY")), f"key-{number}"
            )
        if config.api_key_file and not names:
            raise ConfigError(f"--api-key-file {config.api_key_file}: holds no key, so nobody could ask for anything")
        return cls(names)

    def owner(self, headers: Headers) -> str | None:
        """The name of the key that these headers show; None where no key is needed. Raises `ApiError` 401."""
        if not self.names:
            return None
        shown = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = shown[0].partition(b" ") if len(shown) == 1 else (b"", b"", b"")
        if scheme.lower() != b"bearer" or not token.strip():
            raise _refusal("This server needs an API key: send one header 'Authorization: Bearer KEY'.")
        name = self._name(hashlib.sha256(token.strip()).digest())
        if name is None:
            raise _refusal("The API key is not one that this server knows.")
        return name

    def _name(self, digest: bytes) -> str | None:
        """Each is compared, in constant time: an answer's delay says nothing of any key."""
        found = None
        for known, name in self.names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def hashed_line(name: str, key: str) -> str:
    """The line of a `--api-key-file` for this key. Raises `ConfigError`, which does not show it."""
    if len(_checked(key, "the key")) < _LEAST_LENGTH:
        raise ConfigError(
            f"the key has {len(key)} characters: at least {_LEAST_LENGTH}, as from `openssl rand -hex 32`"
        )
    line = f"{name} sha256:{_digest(key).hex()}"
    if not _LINE.fullmatch(line):
        raise ConfigError(f"{name[:80]!r} cannot name a key: up to 64 letters, digits, '.', '_' and '-'")
    return line


def _checked(key: str, what: str) -> str:
    if not key or not all("!" <= character <= "~" for character in key):
        raise ConfigError(f"{what}: a key is printable ASCII without spaces, and not empty")
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read_file(path: Path) -> dict[bytes, str]:
    try:
        lines = path.expanduser().read_text("ascii").splitlines()
    except OSError as e:
        raise ConfigError(f"--api-key-file {path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file {path}: is not ASCII") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if not (match := _LINE.fullmatch(line.strip())):  # which is not shown: it may be a key in clear
            raise ConfigError(
                f"--api-key-file {path}: line {number} is not 'NAME sha256:HEX', as `darkroom hash-key` makes"
            )
        if match[1] in names.values():
            raise ConfigError(f"--api-key-file {path}: line {number}: another key is named {match[1]!r} already")
        names[bytes.fromhex(match[2])] = match[1]
    return names


def _refusal(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
