"""How fast the engines of one pool are: the shape that they have in common, learnt from the legs of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Protocol

from pd_proxy.fleet.fit import FIT_MEMORY, FREQUENT, Fit

FIRST_PACE = 1 / 8000  # seconds; until an engine of the pool has prefilled anything
_STEP = (0.008, 0.00005, 0.00000004)  # seconds: a step, a sequence and a token held; an 8B model on one good GPU
_HANDOFF = (0.005, 0.000001, 1.0)  # seconds: a hand-off, a token: 100 kB at 100 GB/s
_LEG = (100.0, 1.0, 1 / 32768)  # tokens of work: a leg, a token, and a token for each one before it
_GREATEST_GROWTH = 1e12
CHUNK = 8192  # tokens: legs that are computed in one step of the engine are answered together
_LEARNT = 64  # observations


class Member(Protocol):
    """What a pool asks of its engines' speeds (`speeds.py`)."""

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
    """What the engines of one pool have in common: the shape of prefill's work, the fit of decode's step, hand-offs'.

    Attributes:
        leg_tokens: what any leg costs, in tokens of work.
        growth: tokens before a token at which attention costs as much as everything else.
        base, each_sequence, each_token: seconds of a step, by the fit, of an engine of factor 1.
        usual_factor: the median of the engines' factors, when it was last looked at.
        each_in_flight: seconds that a token in flight adds to it, with the sequence that it is a part of.
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
        self._tokens_each = 0.0  # held by a sequence, on the average
        self.usual_factor = 1.0
        self.leg_tokens = 0.0
        self.growth = _GREATEST_GROWTH
        self.base, self.each_sequence, self.each_token = _STEP
        self.each_in_flight = 0.0
        self._weigh_tokens()

    def add(self, member: Member) -> None:
        """An engine has joined."""
        self._members.append(member)

    def leave(self, speeds: Member) -> None:
        """An engine has left for good."""
        if speeds in self._members:
            self._members.remove(speeds)

    def work(self, uncached: int, prompt: int) -> int:
        """Tokens of work of a leg.

        Arguments:
            uncached: tokens to compute, the last ones of the prompt.
            prompt: its length in tokens.
        """
        return int(uncached + self.leg_tokens + uncached * (prompt - 0.5 * uncached) / self.growth)

    def step(self, sequences: float, tokens: float) -> float:
        """Seconds of a step on an engine of factor 1."""
        return self.base + self.each_sequence * sequences + self.each_token * tokens

    def handoff(self, tokens: int) -> float:
        """Seconds of a hand-off; 0 until one was seen."""
        if not self._handoff.seen:
            return 0.0
        once, each, _ = self._handoff.coefficients
        return once + each * tokens

    @property
    def _every(self) -> int:
        """Observations between two solutions: all engines look at each."""
        return max(FREQUENT, len(self._members))

    @property
    def pace(self) -> float:
        """The median of the engines' paces; a guess until one has prefilled."""
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
        """Legs took `work` (tokens, by their engine's pace) where `expected` was expected."""
        self._turn += 1
        if self._turn & 3 and self._shape.seen > _LEARNT and expected < CHUNK:  # what is known well
            return
        if self._shape.note(legs, uncached, before, work, expected, self._every):
            leg, token, attention = self._shape.coefficients
            token = max(token, 0.1)
            self.leg_tokens = min(leg / token, 1e5)
            self.growth = min(_GREATEST_GROWTH, max(256.0, token / attention)) if attention > 0 else _GREATEST_GROWTH
            self.followed()

    def stepped(self, sequences: int, tokens: int, seconds: float, expected: float) -> None:
        """A step took `seconds` by its engine's factor, where `expected` was expected."""
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
        """A hand-off took so long."""
        if not self._handoff.seen:
            self._handoff.note(1.0, tokens, 0.0, seconds, seconds)
        self._handoff.note(1.0, tokens, 0.0, seconds, max(1e-4, self.handoff(tokens)))

    def _weigh_tokens(self) -> None:
        self.each_in_flight = self.each_token + self.each_sequence / max(self._tokens_each or 2048.0, 1.0)

    def followed(self) -> None:
        """The fits have moved: so do all engines, and those of which nothing is known stay at the median."""
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
