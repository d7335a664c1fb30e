"""The flags of running a server for others: keys, limits, logs, traces, TLS, its end. See docs/operations.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator


def as_list(value: object) -> object:
    """A YAML file may name one without brackets."""
    return [value] if isinstance(value, str) else value


def _like(pattern: str, what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"should be {what}")
        return value

    return AfterValidator(check)


Rate = Annotated[str, _like("[1-9][0-9]{0,5}/(second|minute|hour)", "such as 60/minute: N/second, N/minute or N/hour")]
Origin = Annotated[str, _like(r"\*|https?://[^/?#\s@*]+", "such as https://example.com, with no path, or '*'")]
RemoteHost = Annotated[
    str, _like(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*(:[0-9]{1,5})?", "a host name such as example.com or *.example.com")
]
Prefix = Annotated[str, _like("(/[A-Za-z0-9._~-]+)*", "such as /darkroom, with no slash at its end")]
Url = Annotated[str, _like(r"https?://[^/?#\s@]+(/[^?#\s]*)?", "such as http://127.0.0.1:4318")]
Several = BeforeValidator(as_list)


class OperationsConfig(BaseModel):
    """Who may ask for what, how often; what is written about it; how the server is reached, and ends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key: Annotated[list[SecretStr], Several] = Field(
        [], description="a key that clients must show, once for each; not to be seen in `ps` as DARKROOM_API_KEY"
    )
    api_key_file: Path | None = Field(None, description="file of hashed keys with names, from `darkroom hash-key`")
    protect_metrics: bool = Field(False, description="/metrics needs a key too")
    protect_docs: bool = Field(False, description="/openapi.json needs a key too")
    rate_limit: Rate | None = Field(
        None, description="requests for work per key, or per address without keys: N/second, N/minute or N/hour"
    )
    max_concurrent_per_key: int | None = Field(
        None, ge=1, description="requests for work at one time per key, or per address without keys"
    )
    cors_origin: Annotated[list[Origin], Several] = Field(
        [], description="an origin whose pages may call the API from a browser, once for each; '*' is any"
    )
    allow_remote_media: Annotated[list[RemoteHost], Several] = Field(
        [], description="a host, or '*.suffix', of which https pictures may be fetched, once for each; none by default"
    )
    log_prompts: bool = Field(False, description="write prompts into the request log")
    otlp_endpoint: Url | None = Field(
        None,
        description="where OpenTelemetry traces go, over HTTP, such as http://127.0.0.1:4318; needs the otel extra",
    )
    drain_timeout: float = Field(
        25.0, ge=0, le=86_400, description="seconds that running requests get to end by themselves after SIGTERM"
    )
    root_path: Prefix = Field("", description="the path under which a proxy serves this server, such as /darkroom")
    forwarded_allow_ips: str = Field(
        "127.0.0.1,::1",
        description="addresses of proxies whose X-Forwarded-For and X-Forwarded-Proto count, with commas; '*' is all",
    )
    ssl_keyfile: Path | None = Field(None, description="TLS: the private key, if not in the certificate's file")
    ssl_certfile: Path | None = Field(None, description="TLS: the certificate with its chain; https from then on")
    ssl_keyfile_password: SecretStr | None = Field(None, description="TLS: what the private key is encrypted with")
    ssl_ca_certs: Path | None = Field(None, description="TLS: clients must show a certificate by one of these")
    ssl_ciphers: str | None = Field(
        None, description="TLS: what TLS 1.2 may use, in OpenSSL's words; by default Python's"
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        others = (self.ssl_keyfile, self.ssl_ca_certs, self.ssl_keyfile_password, self.ssl_ciphers)
        if not self.ssl_certfile and any(others):
            raise ValueError("the other --ssl flags need --ssl-certfile")
        return self
