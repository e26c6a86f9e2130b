"""Log lines: their formats, and which requests have one."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pd_proxy.telemetry.logs import JsonFormatter, RequestLog, TextFormatter, set_up_logging
from pd_proxy.telemetry.records import RequestRecord, Stage

GOOD: dict[str, Any] = {
    "endpoint": "chat",
    "request_id": "abc",
    "model": "m",
    "started": 100.0,
    "ended": 101.23456,
    "status": 200,
    "outcome": "ok",
    "stage": Stage.STREAMING,
    "prefill": "http://p:1",
    "decode": "http://d:1",
    "first_token": 100.05,
    "tokens": 7,
}


def record(message: str = "hello", level: int = logging.INFO, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("pd_proxy.request", level, __file__, 1, message, (), None)
    made.created = 1_700_000_000.25
    if fields:
        made.fields = fields
    return made


def finished(caplog: pytest.LogCaptureFixture, every: bool = False, **fields: Any) -> list[logging.LogRecord]:
    """The log lines of a request."""
    caplog.clear()
    caplog.set_level(logging.DEBUG, "pd_proxy.request")
    RequestLog(every).finished(RequestRecord(**{**GOOD, **fields}))
    return caplog.records


# Formats


def test_a_text_line_is_time_level_logger_message_and_fields() -> None:
    line = TextFormatter().format(record("abc chat ok", decode="http://d:1", tokens=7, ttft=0.05))
    assert line == (
        "2023-11-14T22:13:20.250Z info    pd_proxy.request: abc chat ok decode='http://d:1' tokens=7 ttft=0.05"
    )


def test_a_json_line_is_one_object() -> None:
    line = JsonFormatter().format(record("two\nlines", logging.WARNING, tokens=7, error="a\nb"))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "warning",
        "logger": "pd_proxy.request",
        "message": "two\nlines",
        "tokens": 7,
        "error": "a\nb",
    }


@pytest.mark.parametrize("value", ["a\nfake line", "a\r\nb", "\x1b[31mred", "quote ' and \" and \\"])
def test_no_field_can_forge_a_line(value: str) -> None:
    assert len(TextFormatter().format(record(model=value)).splitlines()) == 1
    assert "\x1b" not in TextFormatter().format(record(model=value))
    assert json.loads(JsonFormatter().format(record(model=value)))["model"] == value


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_line_about_an_exception_has_its_traceback(formatter: logging.Formatter) -> None:
    made = record()
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError:
        made.exc_info = sys.exc_info()
    line = formatter.format(made)
    assert "Traceback" in line
    assert "ZeroDivisionError: by zero" in line
    if isinstance(formatter, JsonFormatter):
        assert "by zero" in json.loads(line)["trace"]


# Which requests have a line


@pytest.mark.parametrize("outcome", ["backend_failed", "no_backend", "total_timeout", "draining", "internal_error"])
def test_a_request_that_failed_is_a_warning(caplog: pytest.LogCaptureFixture, outcome: str) -> None:
    (line,) = finished(caplog, status=502, outcome=outcome, error="it broke")
    assert line.levelno == logging.WARNING
    assert line.getMessage() == f"abc chat {outcome}"


@pytest.mark.parametrize(
    "fields", [{}, {"outcome": "client_gone", "status": 0}, {"outcome": "invalid_request", "status": 400}]
)
def test_successes_disconnects_and_clients_mistakes_are_logged_only_where_that_is_set(
    caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    assert finished(caplog, **fields) == []
    (line,) = finished(caplog, every=True, **fields)
    assert line.levelno == logging.INFO


@pytest.mark.parametrize("fields", [{"fallback": "no_handoff_params"}, {"retries": [("prefill", "cut")]}])
def test_a_success_after_a_retry_resume_or_fallback_is_logged(
    caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    (line,) = finished(caplog, **fields)
    assert line.levelno == logging.INFO


def test_a_text_line_has_the_figures_and_no_empty_values(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = finished(caplog, every=True, retries=[("decode", "cut"), ("decode", "cut")])
    assert line.fields == {  # type: ignore[attr-defined]
        "status": 200,
        "model": "m",
        "stage": "stream",
        "prefill": "http://p:1",
        "decode": "http://d:1",
        "seconds": 1.2346,
        "ttft": 0.05,
        "tokens": 7,
        "retries": 2,
    }


def test_a_json_line_has_false_and_zero_values_too(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = finished(caplog, every=True)
    told = json.loads(JsonFormatter().format(line))
    named = {name: told.get(name) for name in ("id", "route", "outcome", "stream", "retries", "cached_tokens", "error")}
    assert named == {
        "id": "abc",
        "route": "chat",
        "outcome": "ok",
        "stream": False,
        "retries": 0,
        "cached_tokens": 0,
        "error": None,
    }


def test_every_member_of_a_requests_line_is_documented(caplog: pytest.LogCaptureFixture) -> None:
    full: dict[str, Any] = {
        **dict.fromkeys(("alias", "client", "not_resumed", "fallback", "error", "leg", "answer"), "x"),
        "peer": ("192.0.2.1", 7),
        "trace": b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n",
        "first_token_from": "prefill",
        "prefill_seconds": 0.5,
        "handoff_seconds": 0.5,
        "last_token": 101.0,
    }
    (line,) = finished(caplog, every=True, **full)
    page = (Path(__file__).parents[2] / "docs" / "logs.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert documented == list(line.members)  # type: ignore[attr-defined]
    assert line.members["trace_id"] == "4bf92f3577b34da6a3ce929d0e0e4736"  # type: ignore[attr-defined]
    assert line.members["address"] == "192.0.2.1:7"  # type: ignore[attr-defined]


def test_a_json_line_has_the_number_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_proxy.telemetry.logs._worker", 0)
    assert json.loads(JsonFormatter().format(record()))["worker"] == 0


def test_a_long_model_name_is_shortened_in_the_line(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = finished(caplog, every=True, model="m" * 100_000)
    assert len(TextFormatter().format(line)) < 1000


def test_a_line_holds_nothing_but_the_record(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = finished(caplog, every=True)
    text = TextFormatter().format(line)
    assert re.sub(r"\S+=\S+|2\S+Z", "", text).split() == ["info", "pd_proxy.request:", "abc", "chat", "ok"]


# The set-up of logging


@pytest.fixture
def untouched() -> Iterator[None]:
    """Restores the loggers and Python's hooks after the test."""
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    names = ["", "uvicorn", "uvicorn.error", "uvicorn.access", "httpx", "httpcore", "asyncio"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    logging.getLogger().handlers = []
    yield
    logging.captureWarnings(False)
    sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers = handlers
        logger.propagate = propagate


@pytest.mark.parametrize(("shape", "formatter"), [("text", TextFormatter), ("json", JsonFormatter)])
def test_all_logs_go_to_standard_error_in_one_format(
    untouched: None, capfd: pytest.CaptureFixture[str], shape: str, formatter: type[logging.Formatter]
) -> None:
    set_up_logging("info", shape)
    logging.getLogger("pd_proxy.fleet").info("seen")
    logging.getLogger("pd_proxy.fleet").debug("not seen")
    logging.getLogger("some.library").info("seen too")
    (handler,) = logging.getLogger().handlers
    handler.flush()
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    assert type(handler.formatter) is formatter


def test_libraries_log_warnings_and_errors_only(untouched: None, capfd: pytest.CaptureFixture[str]) -> None:
    set_up_logging("debug", "text")
    for name in ("httpx", "httpcore", "asyncio", "uvicorn.error"):
        logging.getLogger(name).info("GET http://engine/?key=secret")
    logging.getLogger("uvicorn.access").info("a line a request")
    logging.getLogger().handlers[0].flush()
    assert capfd.readouterr().err == ""


def test_messages_that_python_writes_to_standard_error_become_log_lines(
    untouched: None, capfd: pytest.CaptureFixture[str]
) -> None:
    class Bad:
        def __del__(self) -> None:
            raise ZeroDivisionError("while it is forgotten")

    def fails() -> None:
        raise ZeroDivisionError("in a thread")

    set_up_logging("info", "json")
    Bad()
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    warnings.warn("be warned", UserWarning, stacklevel=1)
    sys.excepthook(ZeroDivisionError, ZeroDivisionError("in the main thread"), None)
    logging.getLogger().handlers[0].flush()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    said = [line["message"] + line.get("trace", "") for line in lines]
    for text in ("while it is forgotten", "in a thread", "be warned", "in the main thread"):
        assert any(text in line for line in said), text
    assert len(lines) == 4


def test_refusals_under_overload_have_no_lines_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    refused = {"status": 503, "outcome": "queue_full", "refused": "queue_full", "stage": Stage.QUEUED}
    assert finished(caplog, **refused) == []
    [line] = finished(caplog, every=True, client="batch", queued_seconds=0.5, **refused)
    fields = line.fields  # type: ignore[attr-defined]
    assert (fields["client"], fields["queued"]) == ("batch", 0.5)
