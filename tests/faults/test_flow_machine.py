"""Requests and faults in any order, at any moment, as Hypothesis likes; in virtual time, over real sockets.

Whatever happens: every lease is given back once, every leg that was begun is ended once, and a client's answer is
complete and right, or it ends with one error. With one engine of each pool left in peace, it is complete and right.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pd_proxy.fleet.backend import Lease
from pd_proxy.http.connection import Connection
from pd_proxy_simulator import Simulator
from pd_proxy_simulator.faults import Kind
from pd_proxy_simulator.prompts import render_chat
from pd_proxy_simulator.sequences import Sampling, Sequence
from pd_proxy_simulator.tokens import start_state, tokenize

from tests.contract.cases import CASES
from tests.faults import bed as beds
from tests.faults.bed import Bed, Heard
from tests.faults.clock import virtual_time

pytestmark = pytest.mark.cross_product

BLOCK = 16


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        stop: with a stop string (that never comes): its answer cannot be continued exactly, and nobody should try. As
            long as the client has no text it is begun anew all the same.
    """

    endpoint: str
    stream: bool
    number: int
    max_tokens: int
    usage: bool
    ids: bool
    stop: bool

    def body(self) -> dict[str, Any]:
        text = _prompt(self.number)
        body: dict[str, Any] = {"model": "sim", "max_tokens": self.max_tokens, "temperature": 0, "stream": self.stream}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if self.stream and self.usage:
            body["stream_options"] = {"include_usage": True}
        if self.ids:
            body["return_token_ids"] = True
        if self.stop:
            body["stop"] = ["\x00"]
        return body


@dataclass(frozen=True)
class Right:
    """The right answer to a request."""

    prompt: list[int]
    tokens: list[int]
    pieces: list[str]
    finish_reason: str


def _prompt(number: int) -> str:
    return f"{number} times the " + "river runs past the old harbour and the engine waits " * (1 + number % 4)


@cache
def right(endpoint: str, number: int, max_tokens: int) -> Right:
    """What an engine says by itself."""
    text = _prompt(number)
    prompt = tokenize(text) if endpoint == "completions" else render_chat([{"role": "user", "content": text}], None)
    sequence = Sequence(
        "", 0, prompt, Sampling(max_tokens), origin=start_state(0), block_size=BLOCK, eos_limit=(1 << 24) // 512
    )
    pieces = []
    while sequence.finish_reason is None:
        pieces.append(sequence.generate(BLOCK, 8192))
    return Right(prompt, sequence.output, [piece for piece in pieces if piece], sequence.finish_reason)


class Ledger:
    """Counts leases and legs of the gateway while it is open."""

    def __init__(self) -> None:
        self.leases: dict[Lease, int] = {}  # how often each was released; those from before it was open are not in it
        self.begun: dict[Connection, Any] = {}  # what runs
        self.legs = 0
        self.wrong: list[str] = []
        self._patches = ExitStack()

    def open(self) -> None:
        ledger = self
        take, release = Lease.__init__, Lease.release
        begin, abort = Connection.begin, Connection.abort

        def taking(lease: Lease, *arguments: Any) -> None:
            take(lease, *arguments)
            ledger.leases[lease] = 0

        def releasing(lease: Lease) -> None:
            before = lease.backend.inflight_requests
            release(lease)
            if lease in ledger.leases:
                ledger.leases[lease] += before - lease.backend.inflight_requests

        def beginning(connection: Connection, receiver: Any, *request: Any) -> None:
            if connection in ledger.begun:
                ledger.wrong.append("a leg began on a connection that has one")
            ledger.legs += 1
            counted = ledger.begun[connection] = _Receiver(ledger, connection, receiver)
            begin(connection, counted, *request)

        def aborting(connection: Connection) -> None:
            if (counted := ledger.begun.get(connection)) is not None:
                counted.close()
            abort(connection)

        for owner, name, wrapper in (
            (Lease, "__init__", taking),
            (Lease, "release", releasing),
            (Connection, "begin", beginning),
            (Connection, "abort", aborting),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, wrapper))

    def close(self) -> None:
        self._patches.close()

    def check(self) -> None:
        """Nothing is in flight."""
        assert not self.wrong, self.wrong
        assert not self.begun, f"{len(self.begun)} of {self.legs} legs were never ended"
        counts = Counter(self.leases.values())
        assert set(counts) <= {1}, f"leases by times released: {dict(counts)}"


class _Receiver:
    """A receiver that notes the end of its exchange, which is its answer's end, its loss, or its abortion."""

    def __init__(self, ledger: Ledger, connection: Connection, receiver: Any) -> None:
        self._ledger = ledger
        self._connection = connection
        self._receiver = receiver
        self._notified = False
        self.head = receiver.head
        self.data = receiver.data

    def close(self) -> None:
        if self._ledger.begun.get(self._connection) is self:
            del self._ledger.begun[self._connection]

    def end(self) -> None:
        self._notify(self._receiver.end)

    def lost(self, error: Any) -> None:
        self._notify(self._receiver.lost, error)

    def _notify(self, what: Any, *arguments: Any) -> None:
        if self._notified:
            self._ledger.wrong.append("a leg was ended twice")
        self._notified = True
        self.close()
        what(*arguments)


def asked(stream: bool | None = None) -> st.SearchStrategy[Asked]:
    return st.builds(
        Asked,
        endpoint=st.sampled_from(["chat", "completions"]),
        stream=st.booleans() if stream is None else st.just(stream),
        number=st.integers(0, 30),
        max_tokens=st.sampled_from([24, 24, 24, 17, 9, 2, 1]),
        usage=st.booleans(),
        ids=st.booleans(),
        stop=st.sampled_from([False] * 5 + [True]),
    )


def fault(kind: Kind, **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Fault]:
    return st.fixed_dictionaries(options).map(lambda drawn: (kind, drawn))


Fault = tuple[Kind, dict[str, Any]]
AFTER = st.sampled_from([*range(1, 16), 0, -1])
ENDINGS = st.sampled_from(["reset", "close", "kill", "truncated", "garbage", "json", "error", "done", "end"])
BREAKS = st.one_of(
    fault("die_mid_stream", ending=ENDINGS, after_tokens=AFTER),
    fault("die_mid_stream", ending=ENDINGS, after_tokens=AFTER),
    fault("stall_mid_stream", after_tokens=AFTER),
    fault("recomputed", after_tokens=AFTER.filter(lambda after: after >= 0)),
)
"""What befalls an answer that has begun."""
ANY = st.sampled_from(["any", "prefill", "decode", "pull"])
FAULTS = st.one_of(
    BREAKS,
    fault("status", status=st.sampled_from([429, 500, 503]), retry_after=st.sampled_from([None, 1])),
    fault("garbage", form=st.sampled_from(["bytes", "json", "truncated", "error", "empty"])),
    fault("hang", leg=ANY),
    fault("reset", leg=ANY),
    fault("delay_first_byte", delay_s=st.sampled_from([0.01, 0.5, 1.9])),
    fault("slow_body", piece_bytes=st.sampled_from([7, 300]), delay_s=st.sampled_from([0.001, 0.01])),
    fault("error_event_first"),
    fault("drop_handoff_params"),
    fault("engine_death"),
)
MOMENTS = st.sampled_from([0.0, 0.003, 0.01, 0.03, 0.06, 0.1, 0.5, 2.5])


class FlowMachine(RuleBasedStateMachine):
    """A fleet, its clients, and what befalls them.

    Attributes:
        case: the connector its engines speak.
    """

    case = CASES[0]

    def __init__(self) -> None:
        super().__init__()
        self._exit = ExitStack()
        self._runner = self._exit.enter_context(virtual_time())
        self.ledger = Ledger()
        self._open = AsyncExitStack()
        self.clients: list[tuple[Asked, asyncio.Task[Heard]]] = []
        self.left: set[asyncio.Task[Heard]] = set()
        self.bed: Bed = self._runner.run(self._open.enter_async_context(beds.made(case=self.case, max_num_seqs=4)))
        # Whoever is struck gets the requests: nothing happens to those that never meet a fault.
        self._steering = self._exit.enter_context(ExitStack())
        self._steering.enter_context(self.bed.steered())
        self._exit.callback(self.ledger.close)
        self.ledger.open()

    @initialize(peaceful=st.booleans())
    def begin(self, peaceful: bool) -> None:
        """Arguments:
        peaceful: the second engine of each pool is left alone.
        """
        self.peaceful = peaceful

    def _engine(self, number: int) -> Simulator:
        bed = self.bed
        engines = [bed.prefill[0], bed.decode[0]]
        if not self.peaceful:
            engines += [bed.prefill[1], bed.decode[1]]
        return engines[number % len(engines)]

    def _do(self, what: Callable[[], object]) -> None:
        """Do something inside the loop."""

        async def do() -> None:
            what()

        self._runner.run(do())

    # What may happen

    @rule(asked=asked())
    def ask(self, asked: Asked) -> None:
        loop = self._runner.get_loop()
        self.clients.append((asked, loop.create_task(self.bed.ask(asked.endpoint, asked.body()))))

    @rule(asked=asked(stream=True), fault=BREAKS, seconds=MOMENTS)
    def a_stream_breaks(self, asked: Asked, fault: Fault, seconds: float) -> None:
        self.all_is_mended()
        self._strike(1, fault, 1)
        self.ask(asked)
        self.time_passes(seconds)

    @rule(asked=asked(), fault=FAULTS, number=st.integers(0, 1), seconds=MOMENTS)
    def a_request_meets_a_fault(self, asked: Asked, fault: Fault, number: int, seconds: float) -> None:
        self._strike(number, fault, 1)
        self.ask(asked)
        self.time_passes(seconds)

    @rule(asked=asked(), number=st.integers(0, 1), seconds=MOMENTS, more=MOMENTS)
    def an_engine_is_killed_meanwhile(self, asked: Asked, number: int, seconds: float, more: float) -> None:
        self.all_is_mended()
        self.ask(asked)
        self.time_passes(seconds)
        self.kill(number)
        self.time_passes(more)

    @rule(seconds=MOMENTS)
    def time_passes(self, seconds: float) -> None:
        self._runner.run(asyncio.sleep(seconds))

    @rule(number=st.integers(0, 3), fault=FAULTS, count=st.sampled_from([1, 2, None]))
    def strike(self, number: int, fault: Fault, count: int | None) -> None:
        self._strike(number, fault, count)

    def _strike(self, number: int, fault: Fault, count: int | None) -> None:
        kind, options = fault
        engine = self._engine(number)
        self._do(lambda: engine.faults.add(kind, count=count, **options))
        if kind in ("hang", "stall_mid_stream"):
            # Nothing else tells a hung engine from a long answer.
            self._do(lambda: engine.faults.add("hang", leg="health"))

    @rule(number=st.integers(0, 3))
    def kill(self, number: int) -> None:
        engine = self._engine(number)
        if engine.alive:
            self._do(engine.kill)

    @rule(number=st.integers(0, 3))
    def stop(self, number: int) -> None:
        """SIGTERM: what runs is aborted, and the process is gone shortly after."""
        self._do(self._engine(number).terminate)

    @rule(number=st.integers(0, 3))
    def abort(self, number: int) -> None:
        """What runs is aborted by an engine that lives on, as one that is paused and goes on at once."""
        engine = self._engine(number)
        if engine.alive:
            self._do(engine.engine.give_up)

    @rule(asked=asked(), number=st.integers(0, 1), seconds=MOMENTS, more=MOMENTS)
    def an_engine_is_stopped_meanwhile(self, asked: Asked, number: int, seconds: float, more: float) -> None:
        self.all_is_mended()
        self.ask(asked)
        self.time_passes(seconds)
        self.stop(number)
        self.time_passes(more)

    @rule(number=st.integers(0, 3), seconds=st.sampled_from([0.01, 1.0]))
    def refuse(self, number: int, seconds: float) -> None:
        engine = self._engine(number)
        if engine.alive:
            self._do(lambda: engine.faults.add("refuse", duration_s=seconds))

    @rule()
    def all_is_mended(self) -> None:
        self._runner.run(self.bed.repair())

    @precondition(lambda self: any(not task.done() for _, task in self.clients))
    @rule(number=st.integers(0, 7))
    def leave(self, number: int) -> None:
        waiting = [task for _, task in self.clients if not task.done()]
        task = waiting[number % len(waiting)]
        self.left.add(task)
        self._do(task.cancel)

    # What must hold

    @invariant()
    def nothing_is_ended_twice(self) -> None:
        assert not self.ledger.wrong, self.ledger.wrong
        assert max(self.ledger.leases.values(), default=1) <= 1, "a lease was given back twice"

    def teardown(self) -> None:
        try:
            self._runner.run(self._end())
        finally:
            self._exit.close()

    async def _end(self) -> None:
        async with self._open:
            if self.clients:
                await asyncio.wait([task for _, task in self.clients])
            for asked, task in self.clients:
                if task not in self.left:
                    self._check(asked, task.result())
            self._steering.close()
            assert await self.bed.until(lambda: not self.bed.gateway_idle(), 10), self.bed.gateway_idle()
            await self.bed.repair()
            wait = beds.LEASE + beds.SOON
            assert await self.bed.until(lambda: not self.bed.engines_idle(), wait), self.bed.engines_idle()
        self.ledger.check()

    def _check(self, asked: Asked, heard: Heard) -> None:
        answer = right(asked.endpoint, asked.number, asked.max_tokens)
        where = f"{json.dumps(asked.body())}\n{heard}\n{answer.pieces}"
        assert not heard.flaws and heard.whole, where
        if heard.error:
            assert not (self.peaceful and not (asked.stop and asked.stream and heard.pieces)), where
            if heard.status == 200:
                assert asked.stream and not heard.dones, where
                assert answer.pieces[: len(heard.pieces)] == heard.pieces, where
                assert answer.tokens[: len(heard.tokens)] == heard.tokens, where
            return
        assert heard.status == 200, where
        assert heard.text == "".join(answer.pieces) and (not asked.stream or heard.pieces == answer.pieces), where
        assert heard.finish_reasons == [answer.finish_reason], where
        assert len(heard.ids) == len(heard.created) == 1, where
        assert (heard.roles, heard.dones) == ((asked.stream and asked.endpoint == "chat"), asked.stream), where
        counts = (len(answer.prompt), len(answer.tokens), len(answer.prompt) + len(answer.tokens))
        assert heard.usages == ([counts] if asked.usage or not asked.stream else []), where
        assert heard.tokens == (answer.tokens if asked.ids else []), where
        assert heard.prompts == ([answer.prompt] if asked.ids else []), where


FlowMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=18,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
TestFlowMachine = pytest.mark.slow(FlowMachine.TestCase)


@pytest.mark.parametrize("more", [{"stop": True}, {"ids": True}, {}], ids=["stop", "ids", "plain"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("ending", ["reset", "kill", "error", "done", "end", "json", "abort"])
def test_a_stream_that_breaks_before_any_text_is_begun_anew(endpoint: str, ending: str, more: dict[str, bool]) -> None:
    """Found by the machine: the one token's text was held back by the stop string, the client had a role and an empty
    delta, and an error that its stream could not be continued."""
    machine = FlowMachine()
    asked = Asked(endpoint, True, 0, 24, **{"usage": True, "ids": False, "stop": False, **more})
    try:
        machine.begin(peaceful=True)
        machine.all_is_mended()
        if ending == "abort":
            machine.ask(asked)
            machine._runner.run(machine.bed.decode[0].wait_for(lambda: machine.bed.decode[0].engine.running > 0))
            machine.abort(1)
        else:
            machine._strike(1, ("die_mid_stream", {"ending": ending, "after_tokens": 1}), 1)
            machine.ask(asked)
        machine.time_passes(0.5)
        machine.nothing_is_ended_twice()
    finally:
        machine.teardown()


class TogetherMachine(FlowMachine):
    """With both legs sent at once."""

    case = next(case for case in CASES if case.name == "mooncake")


TogetherMachine.TestCase.settings = FlowMachine.TestCase.settings
TestTogetherMachine = pytest.mark.slow(TogetherMachine.TestCase)
