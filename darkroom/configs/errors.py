"""The two faults that are somebody else's: the operator's (`ConfigError`) and the client's (`RequestError`).

Everything else that is raised is a bug or a broken machine. Both texts name the thing, the value, the rule and what
would work; both are shown to the person who can mend it, so neither holds a path or a trace.
"""

from __future__ import annotations


class ConfigError(Exception):
    """The operator asked for what cannot be: one line on standard error, exit code 2."""


class RequestError(Exception):
    """The client asked for what cannot be: HTTP 400 with `param` and `code` of the OpenAI error object."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code
