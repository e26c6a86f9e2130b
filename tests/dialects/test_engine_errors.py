"""The errors of engines, in all their shapes."""

from __future__ import annotations

import json
from time import process_time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.dialects.engine_errors import engine_error, engine_error_event
from pd_proxy.errors import BackendAnswered, BackendBusy, BackendFailed, BackendRejected

URL = "http://10.1.2.3:8100"
KINDS: list[tuple[int, type[BackendAnswered]]] = [
    (400, BackendRejected),
    (401, BackendRejected),
    (404, BackendRejected),
    (413, BackendRejected),
    (422, BackendRejected),
    (429, BackendBusy),
    (500, BackendFailed),
    (502, BackendFailed),
    (503, BackendBusy),
    (504, BackendFailed),
]


def whole(message: str, **more: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": "T", "param": None, "code": 1, **more}}).encode()


def client_error(error: BackendAnswered) -> dict[str, Any]:
    """What a client reads of an error, which is always in OpenAI's shape."""
    detail: dict[str, Any] = json.loads(error.body())["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    return detail


@pytest.mark.parametrize(("status", "kind"), KINDS)
def test_a_whole_error_is_passed_on_word_for_word(status: int, kind: type[BackendAnswered]) -> None:
    body = whole("`max_tokens` is too large", hint="kept")
    error = engine_error(URL, status, {}, body)
    assert type(error) is kind
    assert error.status == status
    assert error.body() == body
    assert error.retryable is (kind is not BackendRejected)


@pytest.mark.parametrize(("status", "kind"), KINDS)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": "just words"}', "just words"),
        (b"<html><body>Bad Gateway</body></html>", ""),
        (b"", ""),
        (b"null", ""),
        (b"[1]", ""),
        (b'{"error": null}', ""),
        (b'{"error": {"type": "T"}}', ""),
        (b'{"error": {"message"', ""),
        (b"\xff\xfe", ""),
    ],
    ids=["string", "html", "empty", "null", "list", "null error", "no message", "half", "bytes"],
)
def test_an_error_of_another_shape_is_written_again(
    status: int, kind: type[BackendAnswered], body: bytes, message: str
) -> None:
    error = engine_error(URL, status, {}, body)
    assert type(error) is kind
    assert error.status == status
    assert client_error(error)["message"] == (message or kind.public)
    assert b"html" not in error.body()


@pytest.mark.parametrize("status", [200, 204, 301, 302, 307])
def test_a_status_that_is_neither_good_nor_an_error_is_a_bad_gateway(status: int) -> None:
    error = engine_error(URL, status, {b"location": b"http://elsewhere"}, b"")
    assert type(error) is BackendFailed
    assert error.status == 502


@pytest.mark.parametrize(
    "address",
    [
        "http://10.0.0.7:8100",
        "tcp://node-7:5555",
        "10.0.0.7",
        "node-7.cluster.local:22050",
        "localhost:22050",
        "[fe80::1]:80",
    ],
)
@pytest.mark.parametrize("status", [500, 502, 503])
@pytest.mark.parametrize("bare", [False, True])
def test_an_engines_own_trouble_names_no_address(address: str, status: int, bare: bool) -> None:
    said = f"cannot reach {address} for KV"
    error = engine_error(URL, status, {}, json.dumps({"error": said}).encode() if bare else whole(said))
    assert address.encode() not in error.body()
    assert client_error(error)["message"] == type(error).public
    assert address in str(error)  # for the log


def test_a_clients_own_mistake_may_quote_the_url_it_sent() -> None:
    body = whole("cannot fetch image http://example.com:8080/cat.png")
    assert engine_error(URL, 400, {}, body).body() == body


@pytest.mark.parametrize("status", [400, 500, 503])
def test_the_engines_url_is_for_the_log_only(status: int) -> None:
    error = engine_error(URL, status, {}, b"")
    assert URL in str(error)
    assert b"10.1.2.3" not in error.body()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"7", 7), (b"0", 1), (b"", 1), (b"1.5", 1), (b"-3", 1), (b"Fri, 31 Dec 1999 23:59:59 GMT", 1), (b"9" * 20, 3600)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_engine_has_a_retry_after(status: int, value: bytes, seconds: int) -> None:
    headers = {b"retry-after": value} if value else {}
    assert engine_error(URL, status, headers, b"").retry_after == seconds


@pytest.mark.parametrize(
    ("status", "kind", "unread"),
    [
        (429, "T", True),
        (503, "Service Unavailable", True),
        (503, None, True),
        (503, "ServiceUnavailableError", False),
        (500, None, False),
        (400, None, False),
    ],
)
def test_only_a_front_doors_refusal_left_the_request_unread(status: int, kind: str | None, unread: bool) -> None:
    assert engine_error(URL, status, {}, whole("full", type=kind)).unread is unread


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        (500, BackendFailed, 500),
        (400, BackendRejected, 400),
        (503, BackendBusy, 503),
        (None, BackendFailed, 500),
        ("internal", BackendFailed, 500),
        (200, BackendFailed, 500),
        (0, BackendFailed, 500),
        (1000, BackendFailed, 500),
        (True, BackendFailed, 500),
    ],
)
def test_an_error_events_code_is_its_status(code: object, kind: type[BackendAnswered], status: int) -> None:
    error = engine_error_event(URL, whole("no", code=code))
    assert type(error) is kind
    assert error.status == status


# The hand-off's members


@pytest.mark.parametrize("status", [400, 500, 503])
def test_an_error_carries_no_hand_off(status: int) -> None:
    body = json.dumps({"error": {"message": "no"}, "kv_transfer_params": {"remote_host": "secret-host"}}).encode()
    error = engine_error(URL, status, {}, body)
    assert b"secret-host" not in error.body()
    assert json.loads(error.body()) == {"error": {"message": "no"}}
    assert b"secret-host" not in engine_error_event(URL, body).body()


@pytest.mark.parametrize(("status", "kind"), KINDS)
def test_an_error_that_is_the_whole_answer_is_given_in_openais_shape(status: int, kind: type[BackendAnswered]) -> None:
    said = {"object": "error", "message": "prompt is too long", "type": "BadRequest", "param": None, "code": status}
    error = engine_error(URL, status, {}, json.dumps(said).encode())
    assert type(error) is kind
    assert client_error(error) == {name: said[name] for name in ("message", "type", "param", "code")}


@pytest.mark.parametrize("message", [None, 7, ""])
def test_such_an_error_without_words_is_worded_here(message: object) -> None:
    error = engine_error(URL, 400, {}, json.dumps({"object": "error", "message": message}).encode())
    assert client_error(error)["message"]


def test_such_an_error_keeps_its_addresses_inside() -> None:
    said = {"object": "error", "message": "KVTransferError with 10.0.0.1:8998", "type": "500", "code": 500}
    assert b"10.0.0.1" not in engine_error(URL, 500, {}, json.dumps(said).encode()).body()


# Usage


@pytest.mark.parametrize("status", [400, 404, 422, 429])
@pytest.mark.parametrize(
    ("said", "message", "param"),
    [
        ({"detail": "Not Found"}, "Not Found", None),
        (
            {"detail": [{"loc": ["body", "messages", 0, "role"], "msg": "Field required", "input": {}}]},
            "messages.0.role: Field required",
            "messages.0.role",
        ),
        (
            {"detail": [{"loc": ["body", "a"], "msg": "one"}, {"loc": ["query", "b"], "msg": "two"}]},
            "a: one; query.b: two",
            "a",
        ),
        ({"detail": {"message": "inner"}}, "inner", None),
        ({"detail": {"error": {"message": "deeper"}}}, "deeper", None),
        ({"message": "only a message"}, "only a message", None),
        ({"msg": "short"}, "short", None),
        ({"error": "words", "error_type": "validation"}, "words", None),
        ({"errors": ["first", "second"]}, "first; second", None),
        ([{"loc": ["body", "n"], "msg": "wrong"}], "n: wrong", "n"),
        ("bare words", "bare words", None),
    ],
)
def test_the_reason_of_a_refusal_in_another_shape_is_kept(
    status: int, said: Any, message: str, param: str | None
) -> None:
    error = engine_error(URL, status, {}, json.dumps(said).encode())
    assert error.public_message == message
    assert client_error(error)["message"] == message
    if status != 429:
        assert client_error(error)["param"] == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"max_tokens is too large", "max_tokens is too large"),
        (b"  two\n lines\r\n", "two lines"),
        ("f\u00fcr".encode(), "f\u00fcr"),
        (b'{"error":{"message":"caf\xe9 is closed","type":"T","param":null,"code":1}}', "caf\ufffd is closed"),
        (b'{"detail":"caf\xe9 is closed"}', "caf\ufffd is closed"),
        (b"caf\xe9 is closed", "caf\ufffd is closed"),
        (b"<title>400</title>", BackendRejected.public),
        (b'{"detail": "cut', BackendRejected.public),
        (b"\x00\x01\x02", BackendRejected.public),
        (b'{"detail":' + b"[" * 100_000, BackendRejected.public),
        (b"[" * 500 + b'"x"' + b"]" * 500, BackendRejected.public),
    ],
)
def test_the_words_of_a_refusal_are_kept_as_far_as_they_are_words(body: bytes, message: str) -> None:
    error = engine_error(URL, 400, {}, body)
    assert type(error) is BackendRejected
    assert client_error(error)["message"] == message


@pytest.mark.parametrize("body", [b"x" * 10**6, json.dumps({"detail": "x" * 10**6}).encode(), whole("x" * 10**6)])
def test_a_reason_is_bounded(body: bytes) -> None:
    assert len(engine_error(URL, 400, {}, body).body()) < 3000


@pytest.mark.parametrize(
    "address",
    [
        "http://10.0.0.7:8100/v1",
        "tcp://node-7:5555",
        "10.0.0.7",
        "10.0.0.7:22050",
        "[fe80::1]:80",
        "node-7.cluster.local:22050",
        "http://prefill-0:8000",
        "http://prefill-0.pods.svc:8000/generate",
        "10.1.2.3:8000",
        "bootstrap_room",
        r"10\u002e0\u002e0\u002e7",
    ],
)
@pytest.mark.parametrize("status", [400, 404, 429])
def test_a_refusal_names_no_engines_address(address: str, status: int) -> None:
    plain = address.replace(r"\u002e", ".")
    bodies = [
        b'{"error":{"message":"no %b there","type":"T","param":null,"code":1}}',
        b'{"error":{"message":"no","type":"%b","param":null,"code":1,"peer":"%b"}}',
        b'{"detail":"no %b there"}',
        b'{"detail":[{"loc":["body"],"msg":"no %b there"}]}',
        b'{"object":"error","message":"no %b there","type":"T","param":null,"code":400}',
        b"no %b there",
    ]
    for body in bodies if plain == address else bodies[:-1]:
        error = engine_error("http://10.1.2.3:8000", status, {}, body.replace(b"%b", address.encode()))
        assert client_error(error)["message"].startswith("no") or status == 429
        assert plain not in json.loads(error.body())["error"]["message"]
        assert plain.encode() not in error.body()


def test_the_engines_own_host_is_not_named_either() -> None:
    error = engine_error("http://prefill:8100", 400, {}, whole("prefill:8100 and prefill say no, prefilled is a word"))
    assert client_error(error)["message"] == "[address] and [address] say no, prefilled is a word"


def test_a_reason_full_of_dots_is_searched_in_no_time() -> None:
    started = process_time()
    engine_error(URL, 400, {}, json.dumps({"detail": "a." * 500_000}).encode())
    engine_error(URL, 400, {}, b"a-." * 300_000)
    assert process_time() - started < 2


# Answers in one piece


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode), st.integers(100, 599))
def test_any_answer_becomes_an_error_with_an_answer(body: bytes, status: int) -> None:
    error = engine_error(URL, status, {}, body)
    assert 400 <= error.status <= 599
    assert client_error(error)["message"]
