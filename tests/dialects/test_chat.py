"""The reader of chat by itself, without a relay."""

from __future__ import annotations

import json

import pytest
from pd_proxy.dialects.chat import CHAT
from pd_proxy.relay.transcript import Transcript

from tests.relay.streams import HIDE, URL


class NoPath:
    """A fast path that takes nothing."""

    def learn(self, sample: bytes) -> None: ...

    def take(self, block: bytes) -> tuple[bytes, int, bytes]:
        return b"", 0, block


VALUE = {
    "id": "c",
    "choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "token_ids": [5]}],
    "prompt_token_ids": [1, 2],
}
PAYLOAD = json.dumps(VALUE, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "form",
    [b"data: %b\n\n", b"data:%b\n\n", b"data:%b\r\n\n", b"data: %b\r\r", b"data: %b\r\n\r\n", b": x\ndata: %b\n\n"],
)
def test_the_prompts_ids_are_taken_out_of_an_event_of_any_form(form: bytes) -> None:
    transcript = Transcript()
    reader = CHAT.reader(URL, HIDE, transcript, drop_usage=True)
    shown, count = reader.read(form % PAYLOAD, False, NoPath())
    assert reader.failure is None
    assert (count, transcript.prompt, reader.has_content) == (1, b"1,2", True)
    assert b"token_ids" not in shown and b'"content":"a"' in shown


def test_reading_done_is_the_end_and_later_events_are_still_read() -> None:
    reader = CHAT.reader(URL, HIDE, Transcript(), drop_usage=True)
    shown, count = reader.read(b"data: [DONE]\n\n" + b"data: %b\n\n" % PAYLOAD, True, NoPath())
    assert reader.done and count == 1 and shown
    assert reader.ending() == b"data: [DONE]\n\n"
