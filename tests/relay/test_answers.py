"""What engines answer, in all the shapes they do."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BackendAnswered, BackendBusy, BackendFailed, BackendRejected
from proxy.relay.answers import engine_error, engine_error_event, read_usage, strip_handoff

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


def told(error: BackendAnswered) -> dict[str, Any]:
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
        (b'{"detail": "Not Found"}', ""),
        (b'{"error": null}', ""),
        (b'{"error": {"type": "T"}}', ""),
        (b'{"error": {"message"', ""),
        (b"\xff\xfe", ""),
    ],
    ids=["string", "html", "empty", "null", "list", "detail", "null error", "no message", "half", "bytes"],
)
def test_an_error_of_another_shape_is_said_anew(
    status: int, kind: type[BackendAnswered], body: bytes, message: str
) -> None:
    error = engine_error(URL, status, {}, body)
    assert type(error) is kind
    assert error.status == status
    assert told(error)["message"] == (message or kind.public)
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
    assert told(error)["message"] == type(error).public
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
def test_a_busy_engine_says_when_to_come_back(status: int, value: bytes, seconds: int) -> None:
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


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
def test_the_hand_off_is_taken_out_of_an_answer_and_the_rest_stays_byte_for_byte(field: str) -> None:
    kept = b'{"id":"a","x":1.10,"choices":[{"text":"\\u00e9\\/","n":1e2}]}'
    given_ = kept[:-1] + b',"' + field.encode() + b'":{"remote_host":"10.0.0.1","deep":[{"a":[]}]}}'
    assert strip_handoff(given_) == kept


def test_the_hand_off_is_taken_out_of_choices_too() -> None:
    kept = b'{"id":"a","choices":[{"text":"\\u00e9\\/","n":1e2},{"text":"b"}],"x":1.10}'
    given_ = kept.replace(b'"}', b'","disaggregated_params":{"ctx_info_endpoint":"10.0.0.1"}}')
    given_ = given_.replace(b"1e2}", b'1e2,"disaggregated_params":null}')
    assert strip_handoff(given_) == kept


@pytest.mark.parametrize("choices", [b"7", b"null", b"[1]", b'"x"'])
def test_choices_that_are_none_are_left_alone(choices: bytes) -> None:
    body = b'{"choices":' + choices + b',"x":{"disaggregated_params":1}}'
    assert strip_handoff(body) == body


@pytest.mark.parametrize("body", [b'{"a":1}', b"", b"<html>", b'{ "spaces" : [ ] }', b'{"text":"kv_transfer_params"}'])
def test_a_body_without_a_hand_off_is_not_touched(body: bytes) -> None:
    assert strip_handoff(body) == body


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
    assert told(error) == {name: said[name] for name in ("message", "type", "param", "code")}


@pytest.mark.parametrize("message", [None, 7, ""])
def test_such_an_error_without_words_is_worded_here(message: object) -> None:
    error = engine_error(URL, 400, {}, json.dumps({"object": "error", "message": message}).encode())
    assert told(error)["message"]


def test_such_an_error_keeps_its_addresses_inside() -> None:
    said = {"object": "error", "message": "KVTransferError with 10.0.0.1:8998", "type": "500", "code": 500}
    assert b"10.0.0.1" not in engine_error(URL, 500, {}, json.dumps(said).encode()).body()


# Usage


@pytest.mark.parametrize(
    ("raw", "numbers"),
    [
        (b'{"prompt_tokens":5,"completion_tokens":2}', (5, 2, 0)),
        (b'{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":null}', (5, 2, 0)),
        (b'{"prompt_tokens_details":{"cached_tokens":3,"audio_tokens":0},"total_tokens":7}', (None, None, 3)),
        (b'{"prompt_tokens_details":{"cached_tokens":null}}', (None, None, 0)),
        (b"{}", (None, None, 0)),
    ],
)
def test_usage_is_read_as_far_as_it_is_there(raw: bytes, numbers: tuple[int | None, int | None, int]) -> None:
    usage = read_usage(raw)
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == numbers


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b'"x"', b'{"prompt_tokens":"5"}', b'{"completion_tokens":1.5}'])
def test_usage_that_is_none_is_none(raw: bytes) -> None:
    assert read_usage(msgspec.Raw(raw)) is None


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode), st.integers(100, 599))
def test_any_answer_becomes_an_error_with_an_answer(body: bytes, status: int) -> None:
    error = engine_error(URL, status, {}, body)
    assert 400 <= error.status <= 599
    assert told(error)["message"]
