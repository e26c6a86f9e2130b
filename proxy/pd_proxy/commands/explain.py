"""`pd-proxy explain`: asks a running gateway where it would send a request, and why, without sending it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from pd_proxy.decoding import Undecodable, decode_json
from pd_proxy.errors import BackendError
from pd_proxy.http.control import Answer, Control
from pd_proxy.requests.endpoints import LAYOUTS
from pd_proxy.settings.environment import variable

EXIT_DECIDED, EXIT_NOBODY, EXIT_USAGE = 0, 1, 2
_TIMEOUT = 30.0  # seconds
_MAX_ANSWER = 16 * 1024 * 1024  # bytes: thousands of candidates
_NONE = "-"
_GAP = "  "


class CannotAsk(Exception):
    """The gateway could not be asked, or did not answer with a decision. The text says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `explain`."""
    parser.add_argument(
        "--request", required=True, metavar="FILE", help="the request's body, as JSON; -: standard input"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway (default %(default)s)")
    parser.add_argument(
        "--endpoint",
        choices=tuple(LAYOUTS),
        default="chat",
        help="the route it is for (default %(default)s)",
    )
    parser.add_argument("--client", default="", metavar="NAME", help="the client whose targets count, by its name")
    parser.add_argument(
        "--admin-key-file",
        metavar="FILE",
        help=f"file with the gateway's admin key; without it, the variable {variable('admin_key')}",
    )
    parser.add_argument("--admin-socket", metavar="FILE", help="ask at the gateway's admin_socket instead")
    parser.add_argument("--json", action="store_true", help="print the gateway's answer as it is")


def run(arguments: argparse.Namespace) -> int:
    """Ask the gateway, and print its decision. Returns the exit status: 0 with a decision, 1 where no backend could be
    given the request, 2 where the gateway could not be asked or refused the question."""
    try:
        decision = _asked(arguments)
    except CannotAsk as error:
        print(f"pd-proxy: {error}", file=sys.stderr)
        return EXIT_USAGE
    print(json.dumps(decision, indent=2) if arguments.json else as_text(decision), end="\n" if arguments.json else "")
    return EXIT_NOBODY if decision.get("error") else EXIT_DECIDED


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The gateway's answer.

    Raises:
        CannotAsk
    """
    body = _read(arguments.request)
    url = arguments.url if "://" in arguments.url else f"http://{arguments.url}"
    try:
        parts = urlsplit(url)
        reachable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        reachable = False
    if not reachable:
        raise CannotAsk(f"--url: {arguments.url!r} is not a gateway's URL, such as http://127.0.0.1:8000")
    key = _key(arguments.admin_key_file)
    query = {"endpoint": arguments.endpoint, **({"client": arguments.client} if arguments.client else {})}
    socket = Path(arguments.admin_socket) if arguments.admin_socket else None
    at = url.rstrip("/") if socket is None else "http://localhost"
    control = Control(_TIMEOUT, b"authorization: Bearer %b\r\n" % key if key else b"")
    target = f"{at}/admin/explain?{urlencode(query)}"
    try:
        answer = asyncio.run(control.ask(target, method="POST", body=body, limit=_MAX_ANSWER, socket=socket))
    except BackendError as error:
        raise CannotAsk(f"the gateway at {socket or url} could not be asked: {error}") from None
    return _decision(answer, url)


def _read(name: str) -> bytes:
    """The body of the request."""
    try:
        body = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise CannotAsk(f"--request: {name}: {error.strerror or error}") from None
    if not body.strip():
        raise CannotAsk(f"--request: {name} is empty")
    return body


def _key(name: str | None) -> bytes:
    """The admin key, or nothing."""
    if name is None:
        key = os.environ.get(variable("admin_key"), "").encode()
    else:
        try:
            key = Path(name).read_bytes()
        except OSError as error:
            raise CannotAsk(f"--admin-key-file: {name}: {error.strerror or error}") from None
    key = key.strip()
    if any(byte < 0x21 or byte == 0x7F for byte in key):
        raise CannotAsk("the admin key must be a single word")
    return key


def _decision(answer: Answer, url: str) -> dict[str, Any]:
    """The decision in the gateway's answer.

    Raises:
        CannotAsk: the answer has no decision.
    """
    try:
        said = decode_json(answer.body)
    except Undecodable:
        said = None
    if answer.status == 200 and isinstance(said, dict) and isinstance(said.get("candidates"), list):
        return said
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    hint = " (is it a pd-proxy that has /admin/explain?)" if answer.status in (200, 404, 405) else ""
    raise CannotAsk(f"the gateway at {url} answered {answer.status}: {message or 'nothing that can be read'}{hint}")


def as_text(decision: Mapping[str, Any]) -> str:
    """A decision as text: the backends, the reason, a table of the candidates, and the backends that were excluded."""
    lines = list(_summary(decision))
    candidates = decision["candidates"]
    if candidates:
        head = ("", "ROLE", "BACKEND", "CACHED", "COMPUTES", "WAIT", "OWN", "FIRST TOKEN", "RATE", "STEP", "IN FLIGHT")
        ordered = sorted(candidates, key=lambda one: (_ROLES.get(one["role"], 9), one["first_token"] or 0.0))
        lines += ["", *_table([head, *(_row(one) for one in ordered)])]
    if left_out := decision.get("left_out"):
        rows = [(one["role"], _address(one["url"]), one["rule"]) for one in left_out]
        lines += ["", *_table([("ROLE", "LEFT OUT", "RULE"), *rows])]
    return "\n".join(lines) + "\n"


_ROLES = {"prefill": 0, "decode": 1, "mixed": 2}


def _summary(decision: Mapping[str, Any]) -> Iterable[str]:
    prompt, targets = decision["prompt_tokens"], decision["targets"]
    asked = f"{decision['endpoint']}, {prompt} prompt tokens, {decision['output_tokens']} output tokens expected"
    yield f"request   {asked}" + (f", model {decision['model']}" if decision["model"] else "")
    summary = [f"{name} {value:g} s" for name, value in targets.items() if value is not None]
    if summary:
        yield f"targets   {', '.join(summary)}"
    if decision["error"]:
        yield f"nobody    {decision['error']}"
        return
    prefill, decode = decision["prefill"], decision["decode"]
    if prefill:
        yield f"prefill   {_address(prefill)}"
    name = "prefill" if decision["pool"] == "prefill" else "decode"
    whole = "" if prefill else f" ({decision['pool']} pool; serves the whole request)"
    yield f"{name:<9} {_address(decode)}{whole}"
    yield f"reason    {decision['reason']}"
    if decision["fallback"]:
        yield f"fallback  {decision['fallback']}"


def _row(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "*" if one["chosen"] else "",
        one["role"],
        _address(one["url"]) + (f" (slow start {one['slow_start']:.0%})" if one["slow_start"] else ""),
        str(one["cached"]),
        str(one["uncached"]),
        _seconds(one["wait"]),
        _seconds(one["own"]),
        _seconds(one["first_token"]),
        _NONE if one["rate"] is None else f"{one['rate']:.0f}/s",
        _NONE if one["step"] is None else f"{one['step'] * 1000:.1f} ms",
        f"{one['requests']} req, {one['tokens']} tok",
    )


def _seconds(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f} s"


def _address(url: str) -> str:
    return url.removeprefix("http://")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
