"""One sequence: a prompt, the tokens generated after it, and the state of its KV.

Invariant: `state` and `boundaries` always belong to `tokens`. `error` is zero unless wrong KV was used; it is mixed
into every token that is drawn, so that wrong KV leads to another text and never to an exception.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

from pd_proxy_simulator.blocks import Block
from pd_proxy_simulator.errors import RequestError
from pd_proxy_simulator.structured import Script, Structure, write_script
from pd_proxy_simulator.text import StopStrings, TextAssembler
from pd_proxy_simulator.tokens import EOS, MASK, advance, boundary_states, choose, draw, tokenize
from pd_proxy_simulator.transfers import Transfer


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a sequence is to be continued: the part of vLLM's SamplingParams that the simulator has."""

    max_tokens: int
    min_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    salt: int = 0  # 0: greedy
    structure: Structure | None = None
    recompute_after: int | None = None  # a fault: end with stop_reason "recomputed" after so many tokens


class Status(enum.Enum):
    """The states of a sequence."""

    WAITING = "waiting"
    LOADING = "loading"  # its KV is being fetched from prefill
    RUNNING = "running"
    FINISHED = "finished"


class Listener(Protocol):
    """The interface that receives the tokens of a sequence."""

    def on_token(self, sequence: Sequence, token: int | None, text: str) -> None:
        """Called for one token, with the text that it completed. The sequence knows whether it was the last."""

    def on_failure(self, sequence: Sequence, error: RequestError) -> None:
        """Called when the engine fails the sequence."""


class Sequence:
    """One sequence in one engine."""

    __slots__ = (
        "abandoned",
        "arrived",
        "assembler",
        "blocks",
        "boundaries",
        "cache_key",
        "cache_salt",
        "cached",
        "draws",
        "eos_limit",
        "error",
        "external",
        "finish_reason",
        "first_token_at",
        "given",
        "handoff_params",
        "index",
        "kept",
        "last_token_at",
        "listener",
        "loaded",
        "prefill_left",
        "prompt_length",
        "remote_cached",
        "request_id",
        "sampling",
        "script",
        "script_tokens",
        "sealed",
        "skip_cache",
        "state",
        "status",
        "stop_reason",
        "stops",
        "tokens",
        "transfer",
        "written",
    )

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt: list[int],
        sampling: Sampling,
        *,
        origin: int,
        block_size: int,
        eos_limit: int,
        transfer: Transfer | None = None,
        keep_draws: bool = False,
        cache_key: int = 0,
        cache_salt: str = "",
        skip_cache: bool = False,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.sampling = sampling
        self.eos_limit = eos_limit
        self.transfer = transfer or Transfer()
        self.remote_cached: int | None = None
        self.kept: list[Block] = []  # blocks that have passed over to a hand-off
        self.handoff_params: dict[str, Any] | None = None  # the parameters that a prefill leg answers with
        self.cache_key = cache_key  # requests with another cache_salt share no blocks
        self.cache_salt = cache_salt
        self.skip_cache = skip_cache  # prompt_logprobs: the whole prompt is computed here
        self.boundaries, self.state = boundary_states(origin, prompt, block_size)
        self.error = 0
        self.blocks: list[Block] = []
        self.sealed = 0  # full blocks whose content has been stored
        self.prefill_left = 0
        self.cached = 0  # prompt tokens found in this engine's own prefix cache
        self.written: int | None = None  # prompt tokens computed and put into that cache, where the engine reports it
        self.external = 0  # prompt tokens whose KV came from prefill
        self.loaded = False
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.listener: Listener | None = None
        self.assembler = TextAssembler()
        self.stops = StopStrings(sampling.stop, include=sampling.include_stop) if sampling.stop else None
        self.script: Script | None = None
        self.script_tokens: list[int] = []
        self.draws: list[int] | None = [] if keep_draws else None
        self.given: tuple[int, int] | None = None  # the first token, as prefill has drawn it, and its draw
        self.abandoned = False  # its request ended while the KV was being fetched
        self.arrived = self.first_token_at = self.last_token_at = 0.0

    @property
    def output_length(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.prompt_length

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_length :]

    def key(self, index: int) -> int:
        """The key by which the prefix cache finds the block that ends before a boundary."""
        return self.boundaries[index] ^ self.cache_key

    def taint(self, blocks: list[Block]) -> None:
        """Take over the error of KV that this sequence is going to attend to."""
        for block in blocks:
            if block.error:
                self.error = (self.error * 31 + block.error) & MASK or 1

    def abort(self) -> str:
        """End early; returns the text that was held back."""
        self.finish_reason, self.stop_reason = "abort", None
        text = self.assembler.flush()
        if self.stops is None:
            return text
        shown, _ = self.stops.push(text, armed=False)
        return shown + self.stops.flush()

    def generate(self, block_size: int, context: int) -> str:
        """Draw the next token and append it; returns its text, and sets `finish_reason` if it was the last."""
        sampling = self.sampling
        generated = len(self.tokens) - self.prompt_length
        if sampling.structure is not None and self.script is None:
            self.script = write_script(sampling.structure, draw(self.state ^ self.error, sampling.salt))
            self.script_tokens = tokenize(self.script.text)
        armed = generated >= sampling.min_tokens
        bits = draw(self.state ^ self.error, sampling.salt)
        if self.script is not None:
            token = self.script_tokens[generated] if generated < len(self.script_tokens) else EOS
        else:
            token = choose(bits, self.tokens[-1], self.eos_limit if armed else 0)
        if self.given is not None and not generated:
            token, bits = self.given
        if self.draws is not None:
            self.draws.append(bits)
        self.tokens.append(token)
        self.state = advance(self.state, token)
        if len(self.tokens) % block_size == 0:
            self.boundaries.append(self.state)
        generated += 1
        if token == EOS and not sampling.ignore_eos:
            self.finish_reason = "stop"
        elif armed and token in sampling.stop_token_ids:
            self.finish_reason = "stop"
            self.stop_reason = token
        elif generated >= sampling.max_tokens or len(self.tokens) >= context:
            self.finish_reason = "length"
        if self.finish_reason == "stop" and not (sampling.include_stop and self.stop_reason is not None):
            return self.stops.flush() if self.stops is not None else ""
        text = self.assembler.push(token)
        if self.stops is not None:
            text, found = self.stops.push(text, armed=generated > sampling.min_tokens)
            if found is not None:
                self.finish_reason = "stop"
                self.stop_reason = found
            elif self.finish_reason is not None:
                text += self.stops.flush()
        return text
