"""The stream of SGLang's `/generate`: events without names, each of which repeats everything before it.

Invariant: as from a server without `--incremental-streaming-output`; the last event of each prompt says why it ended.
"""

from __future__ import annotations

from typing import Any

from pd_proxy_simulator import encoding
from pd_proxy_simulator.answers import StreamAnswer
from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.sequences import Sequence
from pd_proxy_simulator.sglang_generate import aborted, is_several, partial_answer


class SGLangStream(StreamAnswer):
    """Sends one event for each token, with `index` where there are several answers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._texts: dict[int, str] = {}

    def fail_first(self, error: RequestError) -> None:
        """Carry out the fault `error_event_first`: abort before any token."""
        self._fail(error)

    def _send_opening(self, sequence: Sequence) -> None:
        """Send nothing: this stream has no event before the first token."""

    def _send_delta(self, sequence: Sequence, tokens: list[int], draws: list[int], text: str) -> None:
        index = sequence.index
        text = self._texts[index] = self._texts.get(index, "") + text
        count = self._handed_out[index]
        event = partial_answer(self.request, sequence, text, count, self.config.weights, last=self._is_last(sequence))
        if is_several(self.request):
            event["index"] = index
        self.exchange.write(encoding.event(event))

    def _fail(self, error: RequestError) -> None:
        self.exchange.write(encoding.event(aborted(self.request, error)))
        self.exchange.write(encoding.DONE)
        self.exchange.end_stream()
        self.finish()

    def _close(self) -> None:
        self.exchange.write(encoding.DONE)
