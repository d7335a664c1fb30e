from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from darkroom.configs.errors import ConfigError
from darkroom.configs.operations import OperationsConfig
from darkroom.server.errors import ApiError
from darkroom.server.keys import Keys, hashed_line

KEY = "sk-0123456789abcdef"


@pytest.fixture
def keys() -> Keys:
    return Keys.read(OperationsConfig(api_key=["sk-other", KEY]))


def shown(value: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"accept", b"*/*"), (b"authorization", value)]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
@pytest.mark.parametrize("gap", [" ", "  "])
def test_the_scheme_is_in_any_case(keys: Keys, scheme: str, gap: str) -> None:
    assert keys.owner(shown(f"{scheme}{gap}{KEY}".encode())) == "key-2"


@pytest.mark.parametrize(
    "value",
    [
        b"", b"Bearer", b"Bearer ", KEY.encode(), b"Basic " + KEY.encode(), b"Bearer:" + KEY.encode(),
        b"Bearer " + KEY[:-1].encode(), b"Bearer " + KEY.encode() + b"x", b"Bearer x" + KEY.encode(),
        b"Bearer " + KEY.upper().encode(), b"Bearer " + KEY.encode() + b"\x00", b"Bearer \xff\xfe",
        b"Bearer " + "schlüssel".encode(), b"\xff\xfe " + KEY.encode(), b"Bearer " + KEY.encode() + b", Bearer y",
        b"Bearer " + b"a" * 60_000,
    ],
)  # fmt: skip
def test_anything_else_is_401(keys: Keys, value: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        keys.owner(shown(value))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert KEY not in str(caught.value)


def test_no_header_and_two_of_them_are_401(keys: Keys) -> None:
    header = (b"authorization", b"Bearer " + KEY.encode())
    for headers in ([], [header, header]):
        with pytest.raises(ApiError):
            keys.owner(headers)


def test_without_keys_anyone_may_ask() -> None:
    assert Keys({}).owner(shown(b"Bearer \xff")) is None


def test_a_file_of_hashes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\n{hashed_line('alice', KEY)}\n{hashed_line('bob', KEY[::-1])}\n")
    keys = Keys.read(OperationsConfig(api_key_file=file, api_key=["third"]))
    assert KEY not in file.read_text()
    assert keys.owner(shown(f"Bearer {KEY}".encode())) == "alice"
    assert keys.owner(shown(f"Bearer {KEY[::-1]}".encode())) == "bob"
    assert keys.owner(shown(b"Bearer third")) == "key-1"
    with pytest.raises(ApiError):  # the hash is not the key
        keys.owner(shown(f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}".encode()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (KEY, "line 1 is not"),
        (f"alice {KEY}", "line 1 is not"),
        ("a b sha256:" + "0" * 64, "line 1 is not"),
        ("# nothing\n", "holds no key"),
        (f"{hashed_line('a', KEY)}\n{hashed_line('a', KEY[::-1])}", "line 2: another key"),
        ("schlüssel", "not ASCII"),
    ],
)
def test_a_file_that_cannot_be_used_is_not_shown(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        Keys.read(OperationsConfig(api_key_file=file))
    assert KEY not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Keys.read(OperationsConfig(api_key_file=tmp_path / "none"))


@pytest.mark.parametrize("key", ["", "with space", "schlüssel", "x\n"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII") as caught:
        Keys.read(OperationsConfig(api_key=[key]))
    assert not key or key not in str(caught.value)


def test_a_hashed_key_is_long_and_named() -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        hashed_line("alice", "short")
    with pytest.raises(ConfigError, match="cannot name a key"):
        hashed_line("a b", KEY)
