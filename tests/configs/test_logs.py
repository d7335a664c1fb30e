from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from darkroom.configs.logs import JsonLines, TextLines, facts

HOSTILE = 'x" a=1\nINFO server: forged \x1b[31m é \ud800'


def record(**values: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "n", "levelno": 20, "levelname": "INFO", "msg": "request", **facts(**values)})


def test_text() -> None:
    line = TextLines("server").format(record(path="/v1/x", status=200, seconds=0.25, key=None, stages={"a": 1}))
    assert line == 'INFO server: request path=/v1/x status=200 seconds=0.25 stages={"a": 1}'


def test_json() -> None:
    members = json.loads(JsonLines("server").format(record(path="/v1/x", status=200)))
    assert members.pop("time").endswith("+00:00")
    assert members == {
        "level": "info", "process": "server", "logger": "n", "message": "request", "path": "/v1/x", "status": 200,
    }  # fmt: skip


@pytest.mark.parametrize("formatter", [TextLines("p"), JsonLines("p")])
def test_what_a_client_sent_forges_nothing(formatter: logging.Formatter) -> None:
    line = formatter.format(record(prompt=HOSTILE))
    assert line.isascii() and line.isprintable()
    quoted = line.partition("prompt=")[2] or json.dumps(json.loads(line)["prompt"])
    assert json.loads(quoted) == HOSTILE


def test_an_exception_is_one_line_of_json() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        failed = logging.makeLogRecord({"msg": "failed", "exc_info": sys.exc_info()})
    line = JsonLines("p").format(failed)
    assert "\n" not in line and "ValueError: why" in json.loads(line)["exception"]


def test_a_process_sets_it_up_once() -> None:
    code = """
import logging
from darkroom.configs.logs import set_up_logging
set_up_logging("info", "json", "worker 3")
logging.getLogger("a").debug("no")
logging.getLogger("a").info("yes")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (json.loads(done.stderr)["process"], json.loads(done.stderr)["message"]) == ("worker 3", "yes")
