from __future__ import annotations

from typing import Any

import pytest

from darkroom.configs import ConfigError, ServeConfig
from darkroom.configs.operations import OperationsConfig


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


@pytest.mark.parametrize("flag", ["--ssl-keyfile", "--ssl-ca-certs", "--ssl-keyfile-password"])
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
