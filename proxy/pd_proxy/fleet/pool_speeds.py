"""The speeds that the engines of one pool have in common, learnt from the legs of all of them (see `speeds.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Protocol

from pd_proxy.fleet.fit import FIT_MEMORY, FREQUENT, Fit

FIRST_PACE = 1 / 8000  # seconds for a token, before any engine of the pool has prefilled
_STEP = (0.008, 0.00005, 0.00000004)  # seconds for a step, a sequence, and a token held; an 8B model on one fast GPU
_HANDOFF = (0.005, 0.000001, 1.0)  # seconds for a hand-off, and for a token of 100 kB at 100 GB/s; the third is unused
_LEG = (100.0, 1.0, 1 / 32768)  # tokens of work for a leg, for a token, and for a token per token before it
_GREATEST_GROWTH = 1e12
CHUNK = 8192  # tokens that an engine computes in one step; legs of one step are answered together
_LEARNT = 64  # observations after which only every fourth one is used


class Member(Protocol):
    """An engine's speeds as its pool sees them (`speeds.py`)."""

    pace: float
    factor: float

    @property
    def prefills(self) -> bool: ...

    @property
    def steps(self) -> bool: ...

    def follow_pace(self, pace: float) -> None: ...

    def follow_factor(self, factor: float) -> None: ...

    def refresh(self) -> None: ...


class PoolSpeeds:
    """The speeds of one pool: the shape of prefill work, the fit of decode steps, and the time of hand-offs.

    Attributes:
        leg_tokens: the fixed cost of a prefill leg, in tokens of work.
        growth: the number of tokens before a token at which attention costs as much as everything else.
        base, each_sequence, each_token: the fitted seconds of a step of an engine of factor 1.
        usual_factor: the median of the engines' factors, when it was last computed.
        each_in_flight: the seconds that a token in flight adds to a step, its share of its sequence included.
    """

    __slots__ = (
        "_handoff",
        "_members",
        "_shape",
        "_step",
        "_tokens_each",
        "_turn",
        "base",
        "each_in_flight",
        "each_sequence",
        "each_token",
        "growth",
        "leg_tokens",
        "usual_factor",
    )

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._shape = Fit(_LEG, (0.0, 1.0, 0.0))
        self._step = Fit(_STEP, (1.0, 1.0, 1.0))
        self._handoff = Fit(_HANDOFF, (1.0, 1.0, 0.0))
        self._turn = 0
        self._tokens_each = 0.0  # mean number of tokens that a sequence holds
        self.usual_factor = 1.0
        self.leg_tokens = 0.0
        self.growth = _GREATEST_GROWTH
        self.base, self.each_sequence, self.each_token = _STEP
        self.each_in_flight = 0.0
        self._weigh_tokens()

    def add(self, member: Member) -> None:
        """Add an engine."""
        self._members.append(member)

    def leave(self, speeds: Member) -> None:
        """Remove an engine."""
        if speeds in self._members:
            self._members.remove(speeds)

    def work(self, uncached: int, prompt: int) -> int:
        """The work of a prefill leg, in tokens.

        Arguments:
            uncached: the tokens to compute, which are the last ones of the prompt.
            prompt: the tokens of the prompt.
        """
        return int(uncached + self.leg_tokens + uncached * (prompt - 0.5 * uncached) / self.growth)

    def step(self, sequences: float, tokens: float) -> float:
        """The seconds of a step on an engine of factor 1."""
        return self.base + self.each_sequence * sequences + self.each_token * tokens

    def handoff(self, tokens: int) -> float:
        """The expected seconds of a hand-off; 0 until one was observed."""
        if not self._handoff.seen:
            return 0.0
        once, each, _ = self._handoff.coefficients
        return once + each * tokens

    @property
    def _every(self) -> int:
        """Observations between two solutions of a fit. At least one for each engine, since a solution updates all."""
        return max(FREQUENT, len(self._members))

    @property
    def pace(self) -> float:
        """The median of the engines' paces; `FIRST_PACE` until one has prefilled."""
        return _median((s.pace for s in self._members if s.prefills), FIRST_PACE)

    @property
    def factor(self) -> float:
        """The median of the engines' factors."""
        return _median((s.factor for s in self._members if s.steps), 1.0)

    @property
    def prefills(self) -> bool:
        """Whether any engine's pace was observed."""
        return self._shape.seen > 0

    @property
    def steps(self) -> bool:
        """Whether any engine's steps were observed."""
        return self._step.seen > 0

    def computed(self, legs: int, uncached: float, before: float, work: float, expected: float) -> None:
        """Add an observation of prefill legs that were computed together.

        Arguments:
            legs: the number of legs.
            uncached, before: the sums of their computed tokens, and of the tokens before each of these.
            work: the tokens of work that their time corresponds to at their engine's pace.
            expected: the tokens of work that were expected.
        """
        self._turn += 1
        if self._turn & 3 and self._shape.seen > _LEARNT and expected < CHUNK:  # legs of well known cost
            return
        if self._shape.note(legs, uncached, before, work, expected, self._every):
            leg, token, attention = self._shape.coefficients
            token = max(token, 0.1)
            self.leg_tokens = min(leg / token, 1e5)
            self.growth = min(_GREATEST_GROWTH, max(256.0, token / attention)) if attention > 0 else _GREATEST_GROWTH
            self.followed()

    def stepped(self, sequences: int, tokens: int, seconds: float, expected: float) -> None:
        """Add an observation of a decode step: it took `seconds`, divided by its engine's factor; `expected` were
        expected."""
        self._turn += 1
        if self._turn & 3 and self._step.seen > _LEARNT:
            return
        each = tokens / sequences
        self._tokens_each += (each - self._tokens_each) / min(self._step.seen + 1, FIT_MEMORY)
        if self._step.note(1.0, sequences, tokens, seconds, expected, self._every):
            self.base, self.each_sequence, self.each_token = self._step.coefficients
            self._weigh_tokens()
            self.followed()

    def handed_over(self, tokens: int, seconds: float) -> None:
        """Add an observation of a hand-off."""
        if not self._handoff.seen:
            self._handoff.note(1.0, tokens, 0.0, seconds, seconds)
        self._handoff.note(1.0, tokens, 0.0, seconds, max(1e-4, self.handoff(tokens)))

    def _weigh_tokens(self) -> None:
        self.each_in_flight = self.each_token + self.each_sequence / max(self._tokens_each or 2048.0, 1.0)

    def followed(self) -> None:
        """Update all engines after a change of the fits. Engines without observations get the pool's median."""
        pace, factor = self.pace, self.factor
        self.usual_factor = factor
        for speeds in self._members:
            if not speeds.prefills:
                speeds.follow_pace(pace)
            if not speeds.steps:
                speeds.follow_factor(factor)
            speeds.refresh()


def _median(values: Iterable[float], default: float) -> float:
    found = list(values)
    return median(found) if found else default
