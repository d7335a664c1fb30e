"""How all processes write their logs: to standard error, as text or as JSON, one line for each record."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]


def set_up_logging(level: str, format: LogFormat, process: str) -> None:
    """Once, at the start of the process that `process` names."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(process) if format == "json" else TextLines(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def facts(**values: object) -> dict[str, dict[str, object]]:
    """What to give as `extra` for members of a record beside its message. None is left out."""
    return {"facts": {name: value for name, value in values.items() if value is not None}}


class TextLines(logging.Formatter):
    """`INFO server: message name=value ...`"""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(levelname)s {process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        members = getattr(record, "facts", {}).items()
        return super().formatMessage(record) + "".join(f" {name}={_word(value)}" for name, value in members)


class JsonLines(logging.Formatter):
    """One object: time, level, process, logger, message, then the record's facts, then its traceback."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        members = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self.process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            members["exception"] = self.formatException(record.exc_info)
        return json.dumps(members, default=str)  # ASCII: what a client sent cannot break a line or a terminal


def _word(value: object) -> str:
    """JSON where a bare word could be misread: a client cannot write a line, or another member, of its own."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    is_plain = text.isascii() and text.isprintable() and not set(text) & set(' "=\\')
    return text if is_plain or not isinstance(value, str) else json.dumps(text)
