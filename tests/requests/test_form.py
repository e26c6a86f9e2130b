"""Multipart forms on their way to an engine."""

from __future__ import annotations

from email import message_from_bytes
from email.message import Message

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests.form import Form
from pd_proxy.requests.members import FORBIDDEN

OWN = b"own-boundary"


def part(name: str, content: bytes, *, extra: str = "", more: str = "") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n{more}\r\n'
    return head.encode() + content + b"\r\n"


def rewritten(body: bytes, content_type: bytes = b"multipart/form-data; boundary=b", size: int = 1 << 20) -> bytes:
    form = Form(content_type, OWN)
    out = b"".join(form.feed(body[start : start + size]) for start in range(0, len(body), size))
    form.end()
    return out


def parts(body: bytes) -> list[tuple[str, str | None, bytes]]:
    """Name, filename and content of each part, as another parser reads them."""
    message = message_from_bytes(b"content-type: multipart/form-data; boundary=own-boundary\r\n\r\n" + body)
    payload = message.get_payload()
    assert isinstance(payload, list)
    found = []
    for one in payload:
        assert isinstance(one, Message)
        content = one.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.append((str(one.get_param("name", header="content-disposition")), one.get_filename(), content))
    return found


WHOLE = (
    part("model", b"whisper")
    + part("file", b"RIFF\x00\r\n--not-it\r\n--", extra='; filename="a.wav"', more="Content-Type: audio/wav\r\n")
    + part("timestamp_granularities[]", b"word")
    + part("timestamp_granularities[]", b"segment")
    + b"--b--\r\n"
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_a_form_arrives_whole_however_it_is_cut(size: int) -> None:
    out = rewritten(WHOLE, size=size)
    assert out == rewritten(WHOLE)
    assert b"--b\r\n" not in out.replace(b"--own-boundary", b"")
    assert b"content-type: audio/wav" in out
    assert out.count(b"RIFF\x00\r\n--not-it\r\n--\r\n--own-boundary") == 1
    assert [name for name, _, _ in parts(out)] == ["model", "file", *["timestamp_granularities[]"] * 2]


def test_a_field_is_reported_as_soon_as_it_has_been_read() -> None:
    form = Form(b"multipart/form-data; boundary=b", OWN)
    form.feed(part("model", b"whisper") + part("stream", b"true")[:-2])
    assert form.fields == {"model": "whisper"}
    form.feed(b"\r\n--b--")
    assert form.fields == {"model": "whisper", "stream": "true"} and form.whole
    assert form.feed(b"\r\nan epilogue") == b""


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_forbidden_fields_are_left_out(name: str) -> None:
    for form in (name, f"{name}[remote_host]", f"{name}.x", f"vllm_xargs[{name}]"):
        out = rewritten(part(form, b"{}") + part("model", b"m") + b"--b--")
        assert [named for named, _, _ in parts(out)] == ["model"], form
    out = rewritten(part(name, b"x", extra='; filename="x"') + part("model", b"m") + b"--b--")
    assert [named for named, _, _ in parts(out)] == ["model"]


def test_forbidden_nested_fields_are_left_out() -> None:
    out = rewritten(part("vllm_xargs", b'{"kv_transfer_params":{"a":1},"beta":2}') + b"--b--")
    assert parts(out) == [("vllm_xargs", None, b'{"beta":2}')]
    with pytest.raises(InvalidRequest, match="`vllm_xargs` is not valid JSON"):
        rewritten(part("vllm_xargs", b"{") + b"--b--")


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "ends before its last boundary"),
        (part("model", b"m"), "ends before its last boundary"),
        (b"nonsense that is long enough", "does not begin with its boundary"),
        (b"x", "does not begin with its boundary"),
        (b"--b\r\nno header", "ends before its last boundary"),
        (b"--bx\r\n", "neither a line's end nor --"),
        (b"--b\r\n\r\n\r\nx\r\n--b--", "header that cannot be read"),
        (b"--b\r\ncontent-type: text/plain\r\n\r\nx\r\n--b--", "no name"),
        (part("", b"x") + b"--b--", "no name"),
        (part("a b", b"x") + b"--b--", "no name"),
        (part("a", b"x", extra='; name="kv_transfer_params"') + b"--b--", "content-disposition that cannot be read"),
        (part("a", b"x", extra="; NAME=kv_transfer_params") + b"--b--", "content-disposition that cannot be read"),
        (part("a", b"x", more="Content-Disposition: form-data; name=b\r\n") + b"--b--", "header that cannot be read"),
        (part("a", b"x", more="X-Y: a\x00b\r\n") + b"--b--", "header that cannot be read"),
        (part("a", b"eA==", more="Content-Transfer-Encoding: base64\r\n") + b"--b--", "transfer encoding"),
        (part("a", b"x", more="Content-Type: nonsense\r\n") + b"--b--", "content-type that cannot be read"),
        (part("model", b"a") + part("model", b"b") + b"--b--", "`model` is in the form twice"),
        (part("model", b"a", extra='; filename="a"') + b"--b--", "`model` must not be a file"),
        (part("model", b"\xff") + b"--b--", "`model` must be text"),
        (part("model", b"m" * 70_000) + b"--b--", "`model` exceeds 65536 bytes"),
        (b"--b\r\n" + b"x" * 10_000, "header in the form exceeds 8192 bytes"),
        (part("a", b"x") * 129 + b"--b--", "more than 128 parts"),
    ],
)
def test_invalid_and_ambiguous_forms_are_refused(body: bytes, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        rewritten(body)


@pytest.mark.parametrize(
    "content_type", [b"", b"multipart/form-data", b"application/json", b"multipart/form-data; boundary=a\xffb"]
)
def test_a_form_without_a_boundary_is_refused(content_type: bytes) -> None:
    with pytest.raises(InvalidRequest, match="multipart/form-data, with a boundary"):
        Form(content_type, OWN)


@pytest.mark.parametrize(
    ("extra", "filename"),
    [
        ('; filename="plain.wav"', "plain.wav"),
        ("; filename=plain.wav", "plain.wav"),
        ('; filename="a\\"b.wav"', "a%22b.wav"),
        ("; filename=\"f\"; filename*=utf-8''t%C3%B6ne.wav", "töne.wav"),
        ("; filename*=utf-8''a%0D%0Ab%22.wav", "ab%22.wav"),
        ("; filename*=koi8-r''x", "file"),
    ],
)
def test_a_filename_is_written_in_one_way(extra: str, filename: str) -> None:
    out = rewritten(part("file", b"x", extra=extra) + b"--b--")
    assert f'form-data; name="file"; filename="{filename}"\r\n\r\nx\r\n'.encode() in out


def test_the_form_of_a_real_client_is_understood() -> None:
    content = bytes(range(256)) * 40
    request = httpx.Request(
        "POST", "http://x/", data={"model": "w", "prompt": "é"}, files={"file": ("ä.wav", content, "audio/x-wav")}
    )
    out = rewritten(request.read(), request.headers["content-type"].encode())
    assert out.count(content) == 1
    assert [(name, content) for name, _, content in parts(out)][:2] == [("model", b"w"), ("prompt", "é".encode())]


@given(st.lists(st.tuples(st.sampled_from(["model", "file", "rid", "prompt"]), st.binary(max_size=200)), max_size=5))
def test_contents_are_never_changed(given_parts: list[tuple[str, bytes]]) -> None:
    clean = [(name, content) for name, content in given_parts if b"\r\n--b" not in content]
    body = b"".join(part(name, content, extra='; filename="f"') for name, content in clean if name != "model")
    out = rewritten(body + b"--b--")
    for name, content in clean:
        if name in ("file", "prompt"):
            assert b"\r\n\r\n" + content + b"\r\n--own-boundary" in out


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(garbage: bytes) -> None:
    for body in (garbage, b"--b\r\n" + garbage, part("a", garbage), part("model", b"m") + garbage):
        form = Form(b"multipart/form-data; boundary=b", OWN)
        try:
            form.feed(body)
            form.end()
        except InvalidRequest:
            pass
