"""The fast path: what is learnt, what passes, and what must not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pd_proxy.dialects.edit import Edit
from pd_proxy.dialects.token_pattern import learn_pattern
from pd_proxy.relay import fast_path as relay_fast_path
from pd_proxy.relay.fast_path import FastPath
from pd_proxy.relay.transcript import Transcript
from pd_proxy.telemetry.records import ITL_BOUNDS, Distribution

from .streams import chat, chunk, event, identity, text

pytestmark = pytest.mark.cross_product

ADDRESS = {"remote_host": "10.0.0.1", "remote_port": 5600}


class SlowPath(asyncio.Protocol):
    """Stands for the connection: keeps what it is given."""

    def __init__(self) -> None:
        self.reads: list[bytes] = []
        self.lost: list[Exception | None] = []
        self.eofs = 0

    def data_received(self, data: bytes) -> None:
        self.reads.append(data)

    def eof_received(self) -> None:
        self.eofs += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


class Scene:
    """A fast path and both its ends."""

    def __init__(self, sample: bytes = b"", *, hidden: bool = False, edit: Edit | None = None) -> None:
        self.slow_path = SlowPath()
        self.gaps = Distribution(ITL_BOUNDS)
        self.transcript = Transcript()
        self.transcript.open(b"", b"1,2,3")
        self.written: list[bytes] = []
        self.fast_path = FastPath(
            self.slow_path,
            self.gaps,
            self.transcript,
            SimpleNamespace(pattern=partial(learn_pattern, edit=edit or Edit(hide_ids=hidden), with_ids=hidden)),
        )
        self.fast_path.arm(self.written.append)
        self.fast_path.learn(sample)
        self.fast_path.allow()

    @property
    def ids(self) -> list[bytes]:
        """Of the latest tokens that passed."""
        return self.transcript.fresh

    def passes(self, data: bytes) -> bool:
        """Whether a read is written to the client; it goes to the connection otherwise, as it is."""
        written, parsed = len(self.written), len(self.slow_path.reads)
        self.fast_path.allow()
        self.fast_path.data_received(data)
        if len(self.written) == written:
            assert self.slow_path.reads[parsed:] == [data]
            assert not self.fast_path._clear
            return False
        assert len(self.written) == written + 1
        assert len(self.slow_path.reads) == parsed
        assert self.fast_path._clear
        return True


def completion(token: str, ids: object = (5,), prompt: object = None, **more: object) -> bytes:
    """A completions event with token ids, its members in vLLM's order."""
    choice = {"index": 0, "text": token, "logprobs": None, "finish_reason": None, "stop_reason": None}
    return event(
        {"id": "cmpl-1", "created": 1, "choices": [{**choice, "prompt_token_ids": prompt, "token_ids": ids}]} | more
    )


def spoken(token: str, ids: object = (5,)) -> bytes:
    """A chat event with token ids."""
    return chat({"content": token}, token_ids=ids)


PLAIN: list[Callable[[str], bytes]] = [text, lambda token: chat({"content": token})]
HIDDEN: list[Callable[[str], bytes]] = [completion, spoken]
both = pytest.mark.parametrize(
    ("make", "hidden"),
    [*((make, False) for make in PLAIN), *((make, True) for make in HIDDEN)],
    ids=["completions", "chat", "completions hidden", "chat hidden"],
)


# Learning


@both
def test_an_event_that_differs_from_the_sample_in_its_text_alone_passes(
    make: Callable[[str], bytes], hidden: bool
) -> None:
    scene = Scene(make("learnt"), hidden=hidden)
    for token in ("a", "Hello", " ", "é", "日本", "]", "}]}", "\\n", "5", "x" * 60_000, ",'{", "\\\\"):
        assert scene.passes(chunk(make(token))), token
    assert scene.fast_path.given()[0] == 12


@both
def test_a_leg_that_continues_an_answer_passes_with_the_identity_of_that_answer(
    make: Callable[[str], bytes], hidden: bool
) -> None:
    first = Edit(hide_ids=hidden, identity=identity(id="the-first-one", created=77), earlier_tokens=1)
    scene = Scene(make("learnt"), hidden=hidden, edit=first)
    for token in ("a", "Hello", "é", "x" * 5_000):
        assert scene.passes(chunk(make(token))), token
        shown = make(token)
        assert scene.written[-1] == chunk(first.event(shown, shown[6:-2])), token
        assert b"the-first-one" in scene.written[-1]


def test_a_leg_whose_counts_must_be_changed_in_each_event_takes_the_slow_path() -> None:
    running = text("learnt", usage={"prompt_tokens": 3, "completion_tokens": 1})
    scene = Scene(running, edit=Edit(identity=identity(id="first"), earlier_tokens=1))
    assert not scene.passes(chunk(running))


def test_a_chunk_passes_byte_for_byte() -> None:
    scene = Scene(text("learnt"))
    assert scene.passes(chunk(text("a")))
    assert scene.written == [chunk(text("a"))]


@pytest.mark.parametrize("make", HIDDEN, ids=["completions", "chat"])
@pytest.mark.parametrize("ids", [[0], [7], [151_643], [2**31]])
def test_hidden_ids_are_kept_and_not_shown(make: Callable[..., bytes], ids: list[int]) -> None:
    scene = Scene(make("learnt"), hidden=True)
    for token in ("a", "é" * 10, "x" * 300):
        assert scene.passes(chunk(make(token, ids)))
    for token, written in zip(("a", "é" * 10, "x" * 300), scene.written, strict=True):
        size, _, rest = written.partition(b"\r\n")
        assert int(size, 16) == len(rest) - 2
        assert rest.endswith(b"\n\n\r\n")
        shown = json.loads(rest.removeprefix(b"data: "))
        expected = json.loads(make(token, ids).removeprefix(b"data: "))
        for choice in expected["choices"]:
            del choice["token_ids"]
            choice.pop("prompt_token_ids", None)
        assert shown == expected
    assert scene.ids == [b"%d" % ids[0]] * 3


def test_events_of_two_tokens_pass_once_one_was_learnt() -> None:
    scene = Scene(spoken("learnt", [5, 6]), hidden=True)
    assert scene.passes(chunk(spoken("a", [17, 18])))
    assert scene.ids == [b"17,18"]
    assert not scene.passes(chunk(spoken("b", [19])))
    assert not scene.passes(chunk(spoken("c", [1, 2, 3])))


@both
def test_nothing_passes_before_anything_was_learnt(make: Callable[[str], bytes], hidden: bool) -> None:
    scene = Scene(hidden=hidden)
    assert not scene.passes(chunk(make("a")))
    assert not scene.passes(chunk(make("a")))


@both
def test_nothing_passes_while_something_is_half_read(make: Callable[[str], bytes], hidden: bool) -> None:
    scene = Scene(make("learnt"), hidden=hidden)
    scene.fast_path.block()
    scene.fast_path.data_received(chunk(make("a")))
    assert scene.written == []
    assert scene.slow_path.reads == [chunk(make("a"))]
    assert scene.ids == []
    assert scene.fast_path.given()[0] == 0
    assert scene.passes(chunk(make("b")))  # it was learnt all the same


def test_after_a_read_on_the_slow_path_nothing_passes_until_it_is_allowed() -> None:
    scene = Scene(text("learnt"))
    scene.fast_path.data_received(chunk(text("a")))
    scene.fast_path.data_received(b"1\r\n:\r\n")
    scene.fast_path.data_received(chunk(text("b")))
    assert scene.written == [chunk(text("a"))]
    assert len(scene.slow_path.reads) == 2


def test_another_form_is_learnt_when_the_form_changes() -> None:
    thought, said = chat({"reasoning_content": "hm"}), chat({"content": "x"})
    scene = Scene(thought)
    assert scene.passes(chunk(thought))
    assert not scene.passes(chunk(said))
    scene.fast_path.learn(said)  # as whoever read it says
    assert scene.passes(chunk(chat({"content": "y"})))
    assert not scene.passes(chunk(thought))
    scene.fast_path.learn(thought)
    assert scene.passes(chunk(thought))


def test_a_form_that_cannot_be_learnt_leaves_the_one_that_was() -> None:
    scene = Scene(text("learnt"))
    assert scene.passes(chunk(text("a")))
    scene.fast_path.learn(chat({"tool_calls": [{"index": 0}]}))
    assert not scene.passes(chunk(chat({"tool_calls": [{"index": 0}]})))
    assert scene.fast_path._sample == b""
    assert scene.passes(chunk(text("b")))


def spaced(value: bytes) -> bytes:
    return b"data: " + json.dumps(json.loads(value.removeprefix(b"data: "))).encode() + b"\n\n"


@pytest.mark.parametrize(
    "pattern",
    [
        chat({"content": "x"}, logprobs={"content": [{"token": "x", "logprob": -0.5}]}),
        chat({"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]}),
        chat({}),
        chat({"content": None}),
        chat({"content": "x"}, finish_reason="stop"),
        text('a "quote"'),
        text("a\nline"),
        text("x") + text("y"),
        b": ping\n\n",
        b"event: x\n" + text("x"),
        b": comment\n" + text("x"),
        text("x").replace(b"data: ", b"data:"),
        text("x").replace(b"\n\n", b"\r\r"),
        text("x") + b"\n",
        spaced(text("x")),
        b"data: [DONE]\n\n",
        b"data: {}\n\n",
    ],
)
def test_an_event_that_is_not_ordinary_is_not_learnt(pattern: bytes) -> None:
    scene = Scene(pattern)
    assert not scene.passes(chunk(pattern))
    assert not scene.passes(chunk(pattern.replace(b"x", b"y")))
    assert scene.fast_path.given()[0] == 0


@pytest.mark.parametrize(
    "pattern",
    [
        text("x"),  # no ids
        completion("x", None),
        completion("x", prompt=[1, 2, 3]),
        spaced(completion("x")),
        completion("x").replace(b'"token_ids":[', b'"token_ids": ['),
        completion("x").replace(b',"token_ids":[', b', "token_ids":['),
        completion("x").replace(b'"token_ids":[5]', b'"more":{"token_ids":[5]}'),
        completion("x").replace(b'"prompt_token_ids":null', b'"prompt_token_ids": null'),
        completion("x").replace(b'"stop_reason":null', b'"stop_reason":7'),
        completion("x").replace(b'"logprobs":null', b'"logprobs":{"tokens":["x"]}'),
        completion("x")
        .replace(b'"index":0,"text":"x"', b'"index":0,"token_ids":[5],"text":"x"')
        .replace(b',"token_ids":[5]}', b"}"),
        spoken('a "quote"'),
    ],
)
def test_an_event_whose_ids_cannot_be_taken_out_is_not_learnt(pattern: bytes) -> None:
    scene = Scene(pattern, hidden=True)
    assert not scene.passes(chunk(pattern))
    assert not scene.passes(chunk(pattern.replace(b'"x"', b'"y"')))
    assert scene.ids == []
    assert scene.fast_path.given()[0] == 0


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
@both
def test_an_event_with_an_address_is_not_learnt(make: Callable[[str], bytes], hidden: bool, field: str) -> None:
    leaking = make("x").replace(b"data: {", b'data: {"%b":{"remote_host":"10.0.0.1"},' % field.encode())
    behind = make("x").replace(b"}\n\n", b',"%b":{"remote_host":"10.0.0.1"}}\n\n' % field.encode())
    for pattern in (leaking, behind):
        scene = Scene(pattern, hidden=hidden)
        assert not scene.passes(chunk(pattern))
        assert scene.written == []


def test_an_event_with_ids_behind_the_ids_is_not_learnt() -> None:
    for ids in (b"[1,2,3]", b"null"):
        pattern = spoken("x").replace(b'"token_ids":[5]', b'"token_ids":[5],"prompt_token_ids":' + ids)
        scene = Scene(pattern, hidden=True)
        assert not scene.passes(chunk(pattern))


@pytest.mark.parametrize("extra", [b'"token_ids":null', b'"prompt_token_ids":null,"token_ids":null'])
@pytest.mark.parametrize("make", PLAIN, ids=["completions", "chat"])
def test_ids_that_are_null_pass_where_nothing_is_hidden(make: Callable[[str], bytes], extra: bytes) -> None:
    """As engines write them to whoever did not ask."""

    def said(token: str) -> bytes:
        return make(token).replace(b'"finish_reason":null', b'"finish_reason":null,' + extra)

    scene = Scene(said("learnt"))
    assert scene.passes(chunk(said("a")))
    assert not scene.passes(chunk(said("a").replace(b'token_ids":null', b'token_ids":[5]')))


def test_ids_that_are_the_clients_own_pass_as_they_are() -> None:
    scene = Scene(completion("learnt"))
    for ids in ([5], [151_643]):
        assert scene.passes(chunk(completion("a", ids)))
        assert scene.written[-1] == chunk(completion("a", ids))
    assert not scene.passes(chunk(completion("a", [5, 6])))
    assert scene.ids == []


# Several at once

RESUMED = identity(id="the-first-one", created=77)
TEXTS = st.one_of(
    st.sampled_from(
        ["a", "5", "12", " ", "]", "}]}", "é", "日本", "\\n", 'say "it"', "\\", "x" * 300, ',"token_ids":[7]', ""]
    ),
    st.text(max_size=8),
)


def odd(make: Callable[..., bytes]) -> list[bytes]:
    """Events that are no ordinary ones, though some look much like them."""
    like = make("x")
    return [
        b": ping\n\n",
        b"data: [DONE]\n\n",
        make(""),
        make('"'),
        event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}),
        event({"error": {"message": "no", "code": 500}}),
        like.replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        like.replace(b'"index":0', b'"index":1'),
        like.replace(b"cmpl-1", b"cmpl-2"),
        like.replace(b"\n\n", b"\r\n\r\n"),
        like.replace(b'"x"', b'"x\ny"'),
        like.replace(b"}\n\n", b',"kv_transfer_params":{"remote_host":"10.0.0.1"}}\n\n'),
        like.replace(b"[5]", b"[5,6]").replace(b'"finish_reason":null', b'"finish_reason":null,"more":1'),
        b"event: x\n" + like,
    ]


@pytest.mark.parametrize("resumed", [False, True], ids=["first leg", "later leg"])
@both
@given(data=st.data())
def test_of_a_block_the_ordinary_events_at_its_front_are_taken_each_as_it_would_be_alone(
    make: Callable[..., bytes], hidden: bool, resumed: bool, data: st.DataObject
) -> None:
    edit = Edit(hide_ids=hidden, identity=RESUMED if resumed else None)
    front = [make(token) for token in data.draw(st.lists(TEXTS.filter(lambda t: t and '"' not in t), max_size=6))]
    rest = data.draw(st.lists(st.one_of(st.sampled_from(odd(make)), TEXTS.map(make)), max_size=4))
    if rest:
        rest[0] = data.draw(st.sampled_from(odd(make)))
    scene = Scene(make("learnt"), hidden=hidden, edit=edit if resumed else None)
    shown, count, left = scene.fast_path.take(b"".join(front + rest))
    assert (count, left) == (len(front), b"".join(rest))
    assert shown == b"".join(edit.event(event, event[6:-2]) for event in front)
    assert scene.ids == [b"5"] * len(front) * hidden
    assert scene.fast_path.given()[0] == 0  # whoever has the time of the read counts them


def test_the_texts_of_a_block_are_kept_where_they_are_wanted() -> None:
    scene = Scene(spoken("learnt"), hidden=True)
    scene.transcript.fresh_text = scene.fast_path._texts = []
    scene.fast_path.take(spoken("a", [6]) + spoken("5") + spoken("\n", [71]) + spoken("", [8]))
    assert scene.ids == [b"6", b"5", b"71"]
    assert scene.transcript.fresh_text == [b"a", b"5", rb"\n"]


def test_numbers_behind_the_text_may_differ_from_event_to_event() -> None:
    scene = Scene(text("learnt", ts=17))
    block = text("a", ts=0) + text("b", ts=123_456)
    assert scene.fast_path.take(block + text("c", ts=None)) == (block, 2, text("c", ts=None))


def test_no_block_is_taken_before_anything_was_learnt() -> None:
    scene = Scene()
    assert scene.fast_path.take(text("a") + text("b")) == (b"", 0, text("a") + text("b"))


def test_of_events_with_other_line_ends_no_block_is_taken() -> None:
    crlf = text("a").replace(b"\n", b"\r\n")
    assert Scene(crlf).fast_path.take(crlf + crlf) == (b"", 0, crlf + crlf)


# Refusing


ORDINARY = text("learnt", usage=None)


def with_framing(data: bytes, head: bytes, tail: bytes = b"\r\n") -> bytes:
    return head + b"\r\n" + data + tail


def of_size(size: int) -> bytes:
    """An ordinary event of so many bytes."""
    return text("x" * (size - len(text("", usage=None))), usage=None)


LETTERED = of_size(0xAB)


@pytest.mark.parametrize(
    "data",
    [
        chunk(event({"error": {"message": "no", "code": 500}})),
        chunk(text("a", error={"message": "no", "code": 500})),
        chunk(text("a", usage={"prompt_tokens": 7})),
        chunk(text("a", usage=None, kv_transfer_params=ADDRESS)),
        chunk(text("a")),
        chunk(text("", usage=None)),
        chunk(text('a "quote"', usage=None)),
        chunk(text('"', usage=None)),
        chunk(text('","finish_reason":null}],"usage":null}\n\n', usage=None)),
        chunk(text("a", usage=None).replace(b'"finish_reason":null', b'"finish_reason":"stop"')),
        chunk(text("a", usage=None).replace(b'"index":0', b'"index":1')),
        chunk(text("a", usage=None).replace(b"cmpl-1", b"cmpl-2")),
        chunk(text("a", usage=None).replace(b"null", b"true")),
        chunk(text("a", usage=None).replace(b"usage", b"usagf")),
        chunk(text("a", usage=None).replace(b"data: ", b"data:")),
        chunk(text("a", usage=None).replace(b"\n\n", b"\r\n\r\n")),
        chunk(text("a", usage=None).replace(b"\n\n", b"\n")),
        chunk(text("a", usage=None) + b"\n"),
        chunk(spaced(text("a", usage=None))),
        chunk(text("a", usage=None) * 2),
        chunk(text("a", usage=None)) * 2,
        chunk(text("a", usage=None)) + b"0\r\n\r\n",
        chunk(text("a", usage=None))[:-1],
        chunk(text("a", usage=None))[1:],
        text("a", usage=None),
        chunk(b"data: [DONE]\n\n"),
        chunk(b": ping\n\n"),
        chunk(text("a", usage=None) + b": ping\n\n"),
        chunk(b": ping\n\n" + text("a", usage=None)),
        chunk(chat({"content": "a"})),
        with_framing(LETTERED, b"AB"),
        with_framing(LETTERED, b"0ab"),
        with_framing(LETTERED, b"ac"),
        with_framing(LETTERED, b"aa"),
        with_framing(LETTERED, b"ab;a=b"),
        with_framing(LETTERED, b"ab "),
        with_framing(LETTERED, b"ab", b"\n\r"),
        with_framing(LETTERED, b"ab", b"\r\n\r\n"),
        b"ab\n" + LETTERED + b"\r\n",
        chunk(of_size(0x10000)),  # longer than the sizes that are known by heart
        b"\r\n",
        b"0\r\n\r\n",
        b"",
    ],
)
def test_whatever_else_goes_to_the_connection_as_it_is(data: bytes) -> None:
    scene = Scene(ORDINARY)
    assert scene.passes(chunk(text("a", usage=None)))
    assert not scene.passes(data)
    assert scene.fast_path.given()[0] == 1
    assert scene.passes(chunk(LETTERED))  # and what was learnt is known still


def test_sizes_about_the_powers_of_sixteen_pass() -> None:
    scene = Scene(ORDINARY)
    for power in (256, 4096, 65536):
        for size in range(power - 6, power + 7):
            assert scene.passes(chunk(of_size(size))) is (size < 65536), size


@pytest.mark.parametrize("length", [1 << 18, 1 << 19])
def test_the_longest_reads_go_to_the_connection(length: int) -> None:
    scene = Scene(ORDINARY)
    assert not scene.passes(chunk(text("x" * length, usage=None)))
    assert scene.passes(chunk(of_size(65527)))


@pytest.mark.parametrize(
    "ids",
    [
        b"[5,6]",
        b"[]",
        b"[5",
        b"5]",
        b"[5,]",
        b"[-5]",
        b"[5.0]",
        b'["5"]',
        b"null",
        b"[[5]]",
        b"[5 ]",
        b"[5],[6]",
        b"[,5]",
    ],
)
def test_ids_of_another_form_go_to_the_connection(ids: bytes) -> None:
    scene = Scene(completion("learnt"), hidden=True)
    assert not scene.passes(chunk(completion("a").replace(b"[5]", ids)))
    assert scene.ids == []
    assert scene.passes(chunk(completion("a")))


@pytest.mark.parametrize(
    "token", ['"token_ids":[9]', ',"token_ids":[9]}]}', '"', '\\","token_ids":[9]', 'x"', '"]', 'kv_transfer_params"']
)
def test_a_text_with_quotes_goes_to_the_connection(token: str) -> None:
    scene = Scene(completion("learnt"), hidden=True)
    assert not scene.passes(chunk(completion(token)))
    assert scene.ids == []


@pytest.mark.parametrize("token", ["token_ids", "[9]", "]", "kv_transfer_params", "\\", "\\\\", "data: [DONE]", "null"])
def test_a_text_with_the_words_of_the_protocol_passes_as_a_text(token: str) -> None:
    scene = Scene(completion("learnt"), hidden=True)
    assert scene.passes(chunk(completion(token, [9])))
    assert scene.ids == [b"9"]
    assert json.loads(scene.written[0].partition(b"data: ")[2])["choices"][0]["text"] == token


EDITS = st.lists(
    st.tuples(
        st.integers(0, 400), st.integers(0, 3), st.binary(max_size=4) | st.sampled_from([b'"', b"5", b"]", b"\n\n"])
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("hidden", [False, True])
@given(token=st.text(min_size=1, max_size=20), edits=EDITS, reframe=st.booleans())
def test_whatever_was_changed_in_an_event_what_passes_differs_in_its_text_and_in_digits(
    hidden: bool, token: str, edits: list[tuple[int, int, bytes]], reframe: bool
) -> None:
    learnt = completion("learnt")
    data = completion(token) if reframe else chunk(completion(token))
    for place, length, insert in edits:
        at = place % (len(data) + 1)
        data = data[:at] + insert + data[at + length :]
    data = chunk(data) if reframe else data
    scene = Scene(learnt, hidden=hidden)
    if not scene.passes(data):
        return
    for passed in (data, *scene.written):
        size, _, rest = passed.partition(b"\r\n")
        assert size == b"%x" % (len(rest) - 2)
    shown = scene.written[0].partition(b"\r\n")[2]
    digits = b"0123456789"
    before, _, behind = learnt.partition(b"learnt")
    if hidden:
        behind = behind.replace(b',"prompt_token_ids":null,"token_ids":[5]', b"")
        if b'","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":[' in data:
            assert scene.ids[0].isdigit()
    assert shown.startswith(before)
    said, quote, rest = shown[len(before) :].partition(b'"')
    assert said
    assert (quote + rest).translate(None, digits) == (behind + b"\r\n").translate(None, digits)


# Counting


class Clock:
    """A clock that a test turns by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(relay_fast_path, "monotonic", clock)
    return clock


def test_before_any_token_there_is_none() -> None:
    scene = Scene()
    assert scene.fast_path.given() == (0, 0.0)
    scene.fast_path.fold()
    assert scene.fast_path.given() == (0, 0.0)
    assert sum(scene.gaps.counts) == 0


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 34, 64, 65, 66, 100, 1000])
@pytest.mark.parametrize("hidden", [False, True])
def test_every_token_is_counted_and_every_gap_noted_once(tokens: int, hidden: bool, clock: Clock) -> None:
    make = completion if hidden else text
    scene = Scene(make("learnt"), hidden=hidden)
    for number in range(1, tokens + 1):
        clock.now += 0.25
        assert scene.passes(chunk(make("a")))
        assert scene.fast_path.given()[0] == number
        assert scene.fast_path.given()[1] == clock.now
        assert number - 40 < sum(scene.gaps.counts) < number  # put away now and then, and none before it is known
    for _ in range(2):  # the second time there is nothing to put away
        scene.fast_path.fold()
        assert scene.fast_path.given()[0] == tokens
        assert scene.fast_path.given()[1] == clock.now
        assert sum(scene.gaps.counts) == scene.gaps.counts[ITL_BOUNDS.index(0.25)] == tokens - 1
        assert scene.gaps.sum == pytest.approx(0.25 * (tokens - 1))
    if hidden:
        assert scene.ids == []
        assert scene.transcript.truncate() == b"1,2,3" + b",5" * tokens


def test_the_pace_of_some_tokens_is_reported_and_that_of_a_few_is_not(clock: Clock) -> None:
    scene, paces = Scene(text("learnt")), list[float]()
    scene.fast_path._pace = paces.append
    for _ in range(40):
        clock.now += 0.25
        assert scene.passes(chunk(text("a")))
    assert paces == [0.25]
    scene.fast_path.fold()
    assert paces == [0.25], "the last seven tokens are too few"


def test_tokens_that_come_together_share_the_time_of_their_read(clock: Clock) -> None:
    scene, paces = Scene(text("learnt")), list[float]()
    scene.fast_path._pace = paces.append
    for _ in range(11):
        clock.now += 0.25
        scene.fast_path.count(5, clock.now)
    scene.fast_path.fold()
    assert paces == [pytest.approx(10 * 0.25 / (10 + 11 * 4))]


def test_ids_are_moved_on_while_the_stream_goes_on() -> None:
    """So that a long answer meets the limit of its transcript in time, and is kept in little memory."""
    scene = Scene(completion("learnt"), hidden=True)
    for _ in range(500):
        assert scene.passes(chunk(completion("a")))
        assert len(scene.ids) < 64


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=30))
def test_tokens_of_either_path_are_counted_in_their_order(reads: list[tuple[int, bool]]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relay_fast_path, "monotonic", clock)
        scene = Scene(text("learnt"))
        expected = 0
        for tokens, fast in reads:
            clock.now += 0.25
            if fast:
                assert scene.passes(chunk(text("a")))
                expected += 1
            else:
                scene.fast_path.count(tokens, clock.now)
                expected += tokens
            assert scene.fast_path.given()[0] == expected
            assert scene.fast_path.given()[1] == clock.now
        scene.fast_path.fold()
    assert sum(scene.gaps.counts) == max(0, expected - 1)
    assert scene.gaps.counts[ITL_BOUNDS.index(0.25)] == max(0, len(reads) - 1)
    assert scene.gaps.sum == pytest.approx(0.25 * max(0, len(reads) - 1))


# All else


def test_calls_of_the_transport_are_passed_on_to_the_connection() -> None:
    scene = Scene()
    error = ConnectionResetError()
    scene.fast_path.eof_received()
    scene.fast_path.connection_lost(error)
    assert scene.slow_path.eofs == 1
    assert scene.slow_path.lost == [error]
