from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from darkroom.configs import CheckConfig, ConfigError, ServeConfig
from darkroom.configs.operations import OperationsConfig
from darkroom.server.keys import Keys


def error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        ServeConfig.parse(["demo", *arguments])
    return str(caught.value)


def test_by_default_nothing_is_open_that_need_not_be() -> None:
    config = OperationsConfig()
    assert (config.cors_origin, config.allow_remote_media, config.log_prompts, config.otlp_endpoint) == (
        [],
        [],
        False,
        None,
    )


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--rate-limit", "0/minute", "such as 60/minute"),
        ("--rate-limit", "60", "such as 60/minute"),
        ("--rate-limit", "٦/minute", "such as 60/minute"),
        ("--rate-limit", "1/minute\n", "such as 60/minute"),
        ("--max-concurrent-per-key", "0", "greater than or equal to 1"),
        ("--cors-origin", "https://a.example/", "with no path"),
        ("--cors-origin", "a.example", "such as https://example.com"),
        ("--allow-remote-media", "https://a.example", "a host name"),
        ("--allow-remote-media", "a.*.example", "a host name"),
        ("--allow-remote-media", "*", "a host name"),
        ("--root-path", "/a/", "no slash at its end"),
        ("--root-path", "a", "such as /darkroom"),
        ("--otlp-endpoint", "127.0.0.1:4318", "such as http://127.0.0.1:4318"),
        ("--drain-timeout", "-1", "greater than or equal to 0"),
        ("--drain-timeout", "nan", "less than or equal to 86400"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_one_that_can(flag: str, value: str, rule: str) -> None:
    message = error(flag, value)
    assert message.startswith(f"{flag} {value!r}") and rule in message


@pytest.mark.parametrize("flag", ["--ssl-keyfile", "--ssl-ca-certs", "--ssl-keyfile-password", "--ssl-ciphers"])
def test_tls_needs_a_certificate(flag: str) -> None:
    assert error(flag, "x") == "the other --ssl flags need --ssl-certfile"
    ServeConfig.parse(["demo", flag, "x", "--ssl-certfile", "y"])


def test_keys_and_passwords_are_not_shown() -> None:
    config: Any = ServeConfig.parse(
        ["demo", "--api-key", "open-sesame", "--ssl-keyfile-password", "open-sesame", "--ssl-certfile", "x"]
    )
    assert "sesame" not in repr(config) and "sesame" not in config.model_dump_json()
    assert "12345678" not in error("--api-key", "12345678")  # read as a number


def test_lists_may_be_given_one_by_one_or_with_commas() -> None:
    config = ServeConfig.parse(["demo", "--api-key", "a", "--api-key", "b,c"])
    assert [key.get_secret_value() for key in config.api_key] == ["a", "b", "c"]


def test_secrets_may_come_from_the_environment_under_flags_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def keys(*arguments: str) -> list[str]:
        return [key.get_secret_value() for key in ServeConfig.parse(["demo", *arguments]).api_key]

    (file := tmp_path / "a.yaml").write_text("api_key: from-the-file\n")
    monkeypatch.setenv("DARKROOM_API_KEY", "sk,secret")
    monkeypatch.setenv("DARKROOM_DATABASE_URL", "postgresql://me:word@host/x")
    monkeypatch.setenv("DARKROOM_SSL_KEYFILE_PASSWORD", "word")
    monkeypatch.setenv("DARKROOM_PORT", "1")
    assert keys("--ssl-certfile", "x") == ["sk,secret"]
    config = ServeConfig.parse(["demo", "--ssl-certfile", "x"])
    assert (config.database_url, config.port) == ("postgresql://me:word@host/x", 8000)  # a port is no secret
    assert config.ssl_keyfile_password and config.ssl_keyfile_password.get_secret_value() == "word"
    assert keys("--ssl-certfile", "x", "--config", str(file)) == ["from-the-file"]
    assert keys("--ssl-certfile", "x", "--config", str(file), "--api-key", "flag") == ["flag"]
    CheckConfig.parse(["demo"])  # has no such flags
    monkeypatch.setenv("DARKROOM_API_KEY", "")
    with pytest.raises(ConfigError, match="DARKROOM_API_KEY: a key is printable ASCII without spaces, and not empty"):
        Keys.read(ServeConfig.parse(["demo", "--ssl-certfile", "x"]))
