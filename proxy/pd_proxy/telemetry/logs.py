"""The log sink: a line for each request that failed, or for every request where that is set; the format of log lines.

Nothing that a client wrote (prompts, keys, headers) is logged, except a valid x-request-id.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import msgspec

from pd_proxy.telemetry.log_queue import LogQueue, standard_error
from pd_proxy.telemetry.records import RequestRecord
from pd_proxy.telemetry.throughput import Throughput

log = logging.getLogger("pd_proxy.request")
log_python = logging.getLogger("pd_proxy.python")


class RequestLog:
    """Logs how requests ended.

    Arguments:
        every: log successful requests as well.
    """

    def __init__(self, every: bool) -> None:
        self._every = every

    def finished(self, record: RequestRecord) -> None:
        # Clients read their own mistakes in the answers; a line for each would let clients fill the log. Admission logs
        # refusals under overload, with one line for many requests.
        failed = record.outcome not in ("ok", "client_gone") and not 400 <= record.status < 500 and not record.refused
        if not (failed or self._every or record.fallback or record.retries or record.resumes):
            return
        log.log(
            logging.WARNING if failed else logging.INFO,
            "%s %s %s",
            record.request_id,
            record.endpoint,
            record.outcome,
            extra=_fields(record),
        )


def _fields(record: RequestRecord) -> dict[str, Any]:
    """`extra` of a request's log line: the fields of a text line, and the members of a JSON line. docs/logs.md explains
    each. Empty values are left out; text lines leave out zeros too."""
    members: dict[str, Any] = {
        "id": record.request_id,
        "route": record.endpoint,
        "outcome": record.outcome,
        "status": record.status,
        "model": record.model[:128],
        "alias": record.alias[:128],
        "client": "" if record.client == "anonymous" else record.client,
        "address": "" if record.peer is None else f"{record.peer[0]}:{record.peer[1]}",
        "stream": record.stream,
        "stage": record.where,
        "queued": round(record.queued_seconds, 4),
        "best_effort": record.best_effort,
        "prefill": record.prefill,
        "decode": record.decode,
        "leg": record.leg,
        "answer": record.answer,
        "trace_id": record.trace_id,
        "seconds": round(record.ended - record.started, 4),
        "ttft": _rounded(record.ttft),
        "tpot": _rounded(record.tpot),
        "prefill_seconds": _rounded(record.prefill_seconds),
        "handoff_seconds": _rounded(record.handoff_seconds),
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "tokens": record.tokens,
        "first_token": record.first_token_from,
        "tries": record.tries,
        "retries": len(record.retries),
        "resumes": len(record.resumes),
        "not_resumed": record.not_resumed,
        "fallback": record.fallback,
        "error": record.error,
    }
    fields = {name: value for name, value in members.items() if value and name not in _IN_MESSAGE}
    return {"fields": fields, "members": {name: value for name, value in members.items() if value not in (None, "")}}


_IN_MESSAGE = frozenset({"id", "route", "outcome"})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


class TextFormatter(logging.Formatter):
    """Formats a record as text: time level logger: message name=value ..."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname.lower():7} {record.name}: {record.getMessage()}"
        for name, value in getattr(record, "fields", {}).items():
            line += f" {name}={value!r}" if isinstance(value, str) else f" {name}={value}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **(getattr(record, "members", None) or getattr(record, "fields", {})),
        }
        if _worker is not None:
            line["worker"] = _worker
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line).decode()
        except UnicodeEncodeError:  # an unpaired surrogate, which UTF-8 cannot encode
            return json.dumps(line)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def log_throughput(throughput: Throughput, in_flight: int, waiting: int) -> None:
    """Log what was served since the last call, if there was anything."""
    fields = throughput.look(in_flight, waiting)
    if fields is not None:
        logging.getLogger("pd_proxy").info("throughput", extra={"fields": fields})


_worker: int | None = None


def name_worker(number: int) -> None:
    """Add the number of this worker to the JSON lines of this process."""
    global _worker
    _worker = number


def set_up_logging(level: str, shape: str) -> None:
    """Send all logs to standard error in one format, through `log_queue.py`. uvicorn and httpx log warnings and errors
    only. Messages that Python itself would write to standard error become log lines as well."""
    handler = LogQueue(JsonFormatter() if shape == "json" else TextFormatter(), standard_error())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").handlers.clear()
    logging.getLogger("uvicorn.access").propagate = False
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable
    threading.excepthook = _thread_failed


def _uncaught(kind: type[BaseException], raised: BaseException, trace: TracebackType | None) -> None:
    log_python.critical("the process failed", exc_info=(kind, raised, trace))


def _unraisable(failure: sys.UnraisableHookArgs) -> None:
    raised = failure.exc_value or failure.exc_type()
    log_python.error("%s", failure.err_msg or "exception ignored", exc_info=raised)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    name = "a thread" if failure.thread is None else f"thread {failure.thread.name}"
    log_python.error("%s failed", name, exc_info=failure.exc_value or True)
