"""The trace context of a request: headers that are valid by W3C's grammar are forwarded to the engines, others not."""

from __future__ import annotations

import pytest
from pd_proxy.api.trace_context import trace_context

TRACE, SPAN = b"4bf92f3577b34da6a3ce929d0e0e4736", b"00f067aa0ba902b7"
PARENT = b"00-%b-%b-01" % (TRACE, SPAN)


def context(parent: bytes, *states: bytes) -> bytes:
    return trace_context([(b"host", b"h"), (b"traceparent", parent), *((b"tracestate", state) for state in states)])


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (PARENT, PARENT),
        (b"  " + PARENT + b"\t", PARENT),
        (b"00-%b-%b-00" % (TRACE, SPAN), b"00-%b-%b-00" % (TRACE, SPAN)),
        (b"00-%b-%b-ff" % (TRACE, SPAN), b"00-%b-%b-ff" % (TRACE, SPAN)),
        (b"cc-%b-%b-01" % (TRACE, SPAN), PARENT),
        (b"cc-%b-%b-03-what-will-be" % (TRACE, SPAN), PARENT),
        (b"cc-%b-%b-02-" % (TRACE, SPAN), b"00-%b-%b-00" % (TRACE, SPAN)),
    ],
)
def test_a_valid_traceparent_is_forwarded_in_version_00(given: bytes, passed: bytes) -> None:
    assert context(given) == b"traceparent: %b\r\n" % passed


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"00",
        b"ff-%b-%b-01" % (TRACE, SPAN),
        b"00-%b-%b-01" % (b"0" * 32, SPAN),
        b"00-%b-%b-01" % (TRACE, b"0" * 16),
        b"00-%b-%b-01" % (TRACE.upper(), SPAN),
        b"00-%b-%b-01" % (TRACE[:-1], SPAN),
        b"00-%b-%b-01" % (TRACE, SPAN + b"0"),
        b"00-%b-%b-1" % (TRACE, SPAN),
        b"00-%b-%b-01-more" % (TRACE, SPAN),
        b"00-%b-%b-01-" % (TRACE, SPAN),
        b"cc-%b-%b-01.more" % (TRACE, SPAN),
        b"cc-%b-%b-01-\r\nx: y" % (TRACE, SPAN),
        b"cc-%b-%b-01-%b" % (TRACE, SPAN, b"x" * 9999),
        b"0x-%b-%b-01" % (TRACE, SPAN),
        b"00-%b-%b-zz" % (TRACE, SPAN),
        PARENT + b"\r\nauthorization: Bearer x",
        PARENT + b"," + PARENT,
        b"00 %b %b 01" % (TRACE, SPAN),
    ],
)
def test_an_invalid_traceparent_is_dropped_together_with_the_tracestate(given: bytes) -> None:
    assert context(given, b"a=1") == b""


def test_two_traceparents_count_as_none() -> None:
    assert trace_context([(b"traceparent", PARENT), (b"traceparent", PARENT)]) == b""


def test_a_tracestate_without_a_traceparent_is_dropped() -> None:
    assert trace_context([(b"tracestate", b"a=1")]) == b""


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ((b"congo=t61rcWkgMzE",), b"congo=t61rcWkgMzE"),
        ((b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",), b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        ((b"a=1 , b=2,\tc=3",), b"a=1,b=2,c=3"),
        ((b"a=1", b"b=2"), b"a=1,b=2"),
        ((b"a=1,,b=2,",), b"a=1,b=2"),
        ((b"0tenant@sys/tem=v",), b"0tenant@sys/tem=v"),
        ((b"a_-*/9=x y~!",), b"a_-*/9=x y~!"),
        ((b",".join(b"k%d=1" % number for number in range(32)),), b",".join(b"k%d=1" % n for n in range(32))),
        ((b"a=" + b"x" * 256,), b"a=" + b"x" * 256),
    ],
)
def test_a_valid_tracestate_is_forwarded(given: tuple[bytes, ...], passed: bytes) -> None:
    assert context(PARENT, *given) == b"traceparent: %b\r\ntracestate: %b\r\n" % (PARENT, passed)


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b" , ",
        b"a",
        b"=1",
        b"a=",
        b"A=1",
        b"a=1,a=2",
        b"a=1,b",
        b"a=x\x01",
        b"a=\xe9",
        b"a=x=y",
        b"9simple=1",
        b"a@b@c=1",
        b"a@9=1",
        b"a" * 257 + b"=1",
        b"a=" + b"x" * 257,
        b",".join(b"k%d=1" % number for number in range(33)),
        b"a=1\r\nauthorization: Bearer x",
    ],
)
def test_an_invalid_tracestate_is_dropped_and_the_traceparent_stays(given: bytes) -> None:
    assert context(PARENT, given) == b"traceparent: %b\r\n" % PARENT


def test_a_tracestate_that_is_too_long_loses_long_members_first_and_then_the_last_ones() -> None:
    short = [b"k%d=%b" % (number, b"v" * 40) for number in range(9)]
    given = [*short[:4], b"long=" + b"v" * 200, *short[4:], b"longer=" + b"v" * 200]
    passed = context(PARENT, b",".join(given)).split(b"tracestate: ")[1].strip().split(b",")
    assert passed == short
    many = [b"k%02d=%b" % (number, b"v" * 100) for number in range(10)]
    assert context(PARENT, b",".join(many)).split(b"tracestate: ")[1].strip() == b",".join(many[:4])
