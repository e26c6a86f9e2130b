"""The requests of clients, and their course in one run."""

from __future__ import annotations

from dataclasses import dataclass

from bench.fleet.prompts import Prompt


@dataclass(slots=True, eq=False)
class Request:
    """One request of a trace; the same for every policy.

    Attributes:
        time: seconds after the start of the run; a later turn of a session has that of the first one.
        output: tokens that the engine will generate; only the oracle knows this.
        max_tokens: the client's limit, or None.
        ttft, tpot: its SLO in seconds.
        session: the client's name of the conversation; empty where it sends none.
        adapter: LoRA adapter, or empty.
        follow: the next turn, sent `pause` seconds after this one has ended.
    """

    time: float
    prompt: Prompt
    output: int
    ttft: float
    tpot: float
    max_tokens: int | None = None
    session: bytes = b""
    adapter: str = ""
    follow: Request | None = None
    pause: float = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """One request in one run.

    Attributes:
        sent: when its client sent it.
        prefill, decode: index of the engine, `prefill` being -1 where decode computes the prompt; ranks likewise.
        cached: prompt tokens that the engine which computed the prompt had in its cache.
        began: when the prompt's computation began; prefilled: when it was done; pulled: when decode had its KV cache.
        first, ended: when the client had its first and its last token.
        left: prompt tokens to compute.
        generated: tokens generated so far.
        preempted: how often decode has put it back into its queue.
        notes: what the router keeps about it.
    """

    request: Request
    sent: float
    prefill: int = -1
    decode: int = -1
    prefill_rank: int = 0
    decode_rank: int = 0
    cached: int = -1
    began: float = 0.0
    prefilled: float = 0.0
    pulled: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    position: int = 0
    left: int = 0
    generated: float = 0.0
    joined: float = 0.0
    runs: int = 0
    preempted: int = 0
    lost: bool = False
    notes: object = None

    @property
    def ttft(self) -> float:
        """Seconds until the first token."""
        return self.first - self.sent

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens."""
        count = self.request.output - 1
        return (self.ended - self.first) / count if count > 0 else 0.0

    @property
    def good(self) -> bool:
        """Whether it met its SLO."""
        return self.ttft <= self.request.ttft and self.tpot <= self.request.tpot
