"""How fast engines are: learnt from their legs, and what a new leg may expect of them.

Plain values; the time is passed in. What is kept of an engine has a fixed size, but for one number for each prefill leg
that it has now.

**Prefill.** A leg of `u` uncached tokens that end a prompt of `p` costs `u + leg_tokens + u·(p - u/2)/growth` tokens of
work: `leg_tokens` is what any leg costs, and the last term is attention, which grows with the tokens before. An engine
does one token of work in `pace` seconds of busy time. The shape (`leg_tokens`, `growth`) is the pool's, the pace the
engine's.

**Decode.** A step, so the gap between two tokens of a stream, takes `factor · (a + b·sequences + c·tokens held)`: one
fit for the pool, and a factor for each engine.

Both fits are least squares over relative errors, with old observations decayed, no coefficient below zero, and a weak
pull to a prior, so that what has not been seen to vary stays as it was thought. A pace and a factor are decayed means
of observed over expected. One observation counts as at most twice or half of what was expected (Huber 1964), until
several in a row agree that it is more: a freak moves little, a change is followed within some legs.
"""

from __future__ import annotations

from collections import deque
from math import exp, inf

from pd_proxy.fleet.fit import Mean
from pd_proxy.fleet.pool_speeds import CHUNK, FIRST_PACE, PoolSpeeds

MOST_TOKENS = 100_000_000
"""Tokens of a prompt, or held by an engine; what says more is wrong."""
_MOST_SEQUENCES = 100_000
_MOST_SECONDS = 3600.0  # of a leg, a token or a hand-off
_SLOWEST_PACE, _FASTEST_PACE = 1.0, 1e-8
_LEAST_FACTOR, _GREATEST_FACTOR = 1e-4, 1e4
_FULL_LEG = 512  # tokens: a shorter leg says less of the pace
_MEMORY = 24.0  # full legs
_BUSY_MEMORY = 15.0  # seconds of busy time; whichever is shorter
_MOST_GAIN = 0.2  # of one leg, however long
_STEP_MEMORY = 16.0  # streams
_INHERITED = 2.0  # what the pool's median is worth, in full legs (streams)
_OVERDUE = 0.5  # seconds beyond twice of what a leg should take, after which it is taken for stuck
_FORGOTTEN = 120.0  # seconds out of the rotation, after which an engine is a new one
_SILENT = 900.0  # seconds without an answer after which what is outstanding is not
_ALIKE = 0.08  # of the pool's median factor, by which an engine of the same speed may be off
_GAP_WEIGHT = 0.25
_WINDOW = 8.0  # seconds over which prefill's share of an engine that decodes is counted
_MIXED = 1.0  # seconds after a prefill in which gaps have its chunks in them
_GAP_HOLDS = 30.0  # seconds for which an observed gap says how an engine is now
_HANDOFF_PAUSE = 0.05  # seconds between two hand-offs that are looked at: they say much the same
_OBSERVED = 0.01  # seconds of busy time that one observation of the pace has at least: of less a clock says little
_ALONE = 0.25  # of what a leg should take: if it is answered sooner, it was computed with the one before


def join_pool(pool: PoolSpeeds) -> Speeds:
    """The speeds of an engine that joins a pool: at first the pool's median."""
    speeds = Speeds(pool)
    pool.add(speeds)
    speeds.begin()
    return speeds


class Speeds:
    """How fast one engine is. Made by `join_pool`.

    Attributes:
        pool: its pool's.
        pace: seconds of busy time for one token of work.
        factor: its step's time over what the pool's fit says.
        free_at: when it will have done what is outstanding, at its pace.
        rest: seconds of work that surely remain, since only the first leg can be partly done: a new leg waits for about
            `max(free_at - now, rest)`.
        late_at: when the first of them, unanswered by then, is taken to be stuck; `inf` where there is none.
        step_base, step_token: its step's time without a request, and what a token in flight adds to it, in seconds.
        capacity: tokens that its KV cache holds; `inf` while that is not known.
        gap: seconds between two tokens, of late; 0 until one was observed.
        gap_at: when it was last observed.
    """

    __slots__ = (
        "_disturbed",
        "_disturbed_at",
        "_elsewhere",
        "_elsewhere_since",
        "_factor",
        "_given",
        "_left_at",
        "_legs",
        "_next_handoff",
        "_pace",
        "_seconds",
        "_since",
        "_tokens",
        "_tokens_before",
        "_undisturbed_at",
        "_work",
        "_work_done",
        "capacity",
        "factor",
        "free_at",
        "gap",
        "gap_at",
        "late_at",
        "pace",
        "pool",
        "rest",
        "step_base",
        "step_token",
    )

    def __init__(self, pool: PoolSpeeds) -> None:
        self.pool = pool
        self._given: deque[tuple[int, int]] = deque()  # uncached tokens and work of each leg that it has, in order
        self._work = 0  # of these, the sum
        self._elsewhere = 0
        self._elsewhere_since = 0.0
        self._next_handoff = 0.0  # when one is looked at again
        self._since = -inf  # busy time was counted up to here
        self._legs = 0  # legs that were computed together, so that they are one observation
        self._tokens = 0.0
        self._tokens_before = 0.0
        self._work_done = 0.0
        self._seconds = 0.0
        self._pace = Mean(FIRST_PACE, _MEMORY)
        self._factor = Mean(1.0, _STEP_MEMORY)
        self._disturbed = self._disturbed_at = 0.0
        self._undisturbed_at = -inf
        self._left_at: float | None = None
        self.pace = FIRST_PACE
        self.factor = 1.0
        self.free_at = self.rest = 0.0
        self.late_at = inf
        self.capacity: float = inf
        self.gap = self.gap_at = 0.0
        self.step_base = self.step_token = 0.0

    # Prefill

    def given(self, uncached: int, now: float, prompt: int = 0) -> None:
        """A prefill leg was dispatched.

        Arguments:
            uncached: tokens of its prompt that it is believed to have to compute.
            prompt: its length in tokens; what is less than `uncached` is as long as that.
        """
        if not 0 <= uncached <= prompt <= MOST_TOKENS:
            uncached, prompt = _tokens(uncached), max(_tokens(uncached), _tokens(prompt))
        given = self._given
        work = self.pool.work(uncached, prompt)
        if self.gap:  # it decodes, too
            self._disturbed = self._disturbed * exp(min(0.0, self._disturbed_at - now) / _WINDOW) + work * self.pace
            self._disturbed_at = now
        if not given:
            self._since = now
        given.append((uncached, work))
        self._work += work
        if len(given) > 1 or self._elsewhere:
            self._plan()
            return
        seconds = work * self.pace
        self.free_at = now + seconds  # as `_plan` has it of one leg alone
        self.rest = 0.0
        self.late_at = now + 2.0 * seconds + _OVERDUE

    def answered(self, believed: int, computed: int, prompt: int, now: float) -> None:
        """A prefill leg ended well.

        Arguments:
            believed: what `given` was told.
            computed: tokens that the engine did compute, by its own word; `believed` where it says nothing.
            prompt: the prompt's length in tokens.
        """
        given, passed = self._given, 0.0
        if given:
            passed = now - self._since
            passed = 0.0 if passed < 0.0 else passed if passed < _MOST_SECONDS else _MOST_SECONDS
            if given[0][0] == believed:
                self._work -= given.popleft()[1]
            else:
                self._taken(believed)
        self._since = now
        if not 0 <= computed <= prompt <= MOST_TOKENS:
            prompt = _tokens(prompt)
            computed = min(_tokens(computed), prompt)
        work = self.pool.work(computed, prompt)
        if self._elsewhere and passed:  # other workers' legs are computed in the same time
            own = self._work + work
            passed *= own / (own + self._elsewhere) if own else 0.0
        enough = self._seconds >= _OBSERVED or self._pace.seen == 0.0
        if enough and self._seconds > 0.0 and passed > _ALONE * work * self.pace:
            self._learn()
        self._legs += 1
        self._tokens += computed
        self._tokens_before += computed * (prompt - 0.5 * computed)
        self._work_done += work
        self._seconds += passed
        if not given and (self._seconds >= _OBSERVED or self._pace.seen == 0.0):
            self._learn()
        if given or self._elsewhere:
            self._plan()
        else:
            self.free_at = self.rest = 0.0
            self.late_at = inf

    def withdrawn(self, believed: int, now: float) -> None:
        """A prefill leg failed, or was cancelled: it is not outstanding any more, and says nothing of the pace."""
        first = self._given[0][0] if self._given else None
        self._taken(believed)
        if first == _tokens(believed):
            self._since = now
        self._plan()

    def _taken(self, believed: int) -> None:
        """A leg is not outstanding any more. Mostly it is the first."""
        given, believed = self._given, _tokens(believed)
        for index, (uncached, work) in enumerate(given):
            if uncached == believed:
                self._work -= work
                del given[index]
                return
        if given:  # it was told wrong; better one too few than one for ever
            self._work -= given.popleft()[1]

    def _learn(self) -> None:
        """What was computed together is one observation of the pace, and so are some legs that took next to no time."""
        work, seconds, legs = self._work_done, self._seconds, self._legs
        tokens, before = self._tokens, self._tokens_before
        self._legs = 0
        self._tokens = self._tokens_before = self._work_done = self._seconds = 0.0
        if seconds <= 0.0 or tokens < 1.0:
            return
        pool, mean, expected = self.pool, self._pace, work * self.pace
        known = mean.seen > 0.0
        gain = 0.0
        if known:
            gain = expected / _BUSY_MEMORY
            gain = gain if gain < _MOST_GAIN else _MOST_GAIN
        elif pool.prefills:
            mean.seen = _INHERITED
        mean.note(seconds / expected, work / _FULL_LEG if work < _FULL_LEG else 1.0, gain)
        before_it, self.pace = self.pace, mean.bound(_FASTEST_PACE, _SLOWEST_PACE)
        pool.computed(legs, tokens, before, seconds / (before_it if known else self.pace), work)
        if not known:
            pool.followed()

    @property
    def elsewhere_uncached(self) -> int:
        """Uncached tokens that other workers of this gateway have outstanding here."""
        return self._elsewhere

    def note_elsewhere(self, tokens: int, since: float) -> None:
        """Other workers of this gateway have prefill legs here.

        Arguments:
            tokens: uncached ones of these legs; 0 where they have none any more.
            since: their `since`, the latest where they are several.
        """
        if tokens != self._elsewhere or since != self._elsewhere_since:
            if tokens < self._elsewhere and since > self._since and self._given:
                self._since = since  # until then the engine has computed a leg of theirs
            self._elsewhere = _tokens(tokens)
            self._elsewhere_since = since
            self._plan()

    @property
    def since(self) -> float:
        """Since when the first of this worker's outstanding legs has been computed, as far as is known; where it has
        none, when the last one ended."""
        return self._since

    @property
    def outstanding(self) -> int:
        """Uncached tokens that this worker has outstanding here."""
        return sum(uncached for uncached, _ in self._given)

    @property
    def prefills(self) -> bool:
        """Whether its pace was observed."""
        return self._pace.seen > 0.0

    @property
    def rate(self) -> float:
        """Uncached tokens that it prefills in a second, of a prompt that is not long."""
        return 1.0 / self.pace

    def ahead(self, now: float) -> float:
        """Seconds of prefill work before a new leg.

        A leg that takes much longer than it should is taken to last for as long again as it is late.
        """
        left = max(self.free_at - now, self.rest)
        late = now - self.late_at
        if late <= 0.0:
            return left
        return left + late if late < _SILENT else 0.0

    def disturbed(self, now: float) -> float:
        """Seconds of prefill that its streams have waited for, or will, in about the last 8 s."""
        ahead = self.ahead(now)
        lately = self._disturbed * exp(min(0.0, self._disturbed_at - now) / _WINDOW) if self._disturbed else 0.0
        return ahead if ahead > lately else lately

    def seconds(self, uncached: int, prompt: int) -> float:
        """Seconds of a leg's own work.

        Arguments:
            uncached, prompt: tokens to compute, and in all.
        """
        return self.pool.work(uncached, prompt) * self.pace

    def refresh(self) -> None:
        """The pool's fits have moved: find anew what decisions read."""
        self._expect_step(self.factor)
        self._plan()

    def _plan(self) -> None:
        """Find anew when it will have done what is outstanding."""
        pace, given = self.pace, self._given
        work = self._work + self._elsewhere
        if not work:
            self.free_at = self.rest = 0.0
            self.late_at = inf
            return
        first, since = (given[0][1], self._since) if given else (0, self._elsewhere_since)
        front = min(work, first if first > CHUNK else CHUNK)
        self.free_at = since + work * pace
        self.rest = (work - front) * pace
        self.late_at = since + 2.0 * front * pace + _OVERDUE

    # Decode

    def stepped(self, seconds: float, sequences: int, kv_tokens: int, now: float) -> None:
        """A mean gap between two tokens was observed, of a stream whose client read as fast as it came.

        Arguments:
            seconds: the gap.
            sequences: requests that the engine had then.
            kv_tokens: tokens that they held, as `inflight_tokens` counts them.
        """
        if not 0.0 < seconds <= _MOST_SECONDS:
            return
        sequences = min(max(1, sequences), _MOST_SEQUENCES)
        kv_tokens = _tokens(kv_tokens)
        expected = self.pool.step(sequences, kv_tokens)
        if self.gap and now - self.gap_at < _GAP_HOLDS:
            self.gap += _GAP_WEIGHT * (min(seconds, 4 * self.gap) - self.gap)
        else:
            self.gap = seconds
        self.gap_at = now
        known = self.steps
        if not self._given and now - self._since > _MIXED:
            self._undisturbed_at = now
        elif known and now - self._undisturbed_at < _GAP_HOLDS:
            return  # the gap has prefill's chunks in it, which are counted apart
        if not known and self.pool.steps:
            self._factor.seen = _INHERITED
        self._factor.note(seconds / (expected * self.factor))
        before = self.factor
        self.factor = factor = self._factor.bound(_LEAST_FACTOR, _GREATEST_FACTOR)
        pool = self.pool
        pool.stepped(sequences, kv_tokens, seconds / (before if known else factor), expected)
        if not known:
            pool.followed()
        self._expect_step(factor)

    def _expect_step(self, factor: float) -> None:
        """Find anew what decisions read of its step. Engines whose factors differ by a few per cent are alike: to send
        more to the one that chance made the faster ends where steps are at their target."""
        pool = self.pool
        if abs(factor - pool.usual_factor) <= _ALIKE * pool.usual_factor:
            factor = pool.usual_factor
        self.step_base = factor * pool.base
        self.step_token = factor * pool.each_in_flight

    @property
    def steps(self) -> bool:
        """Whether its steps were observed."""
        return self._factor.seen > 0.0

    def step(self, sequences: int, kv_tokens: int) -> float:
        """Seconds that a step is expected to take.

        Arguments:
            sequences, kv_tokens: as for `stepped`.
        """
        return self.factor * self.pool.step(sequences, kv_tokens)

    @property
    def slowness(self) -> float:
        """Its step's time over that of its pool's median engine."""
        return self.factor / self.pool.factor

    def handed_over(self, seconds: float, tokens: int, now: float) -> None:
        """A hand-off to it took so long, from prefill's answer to decode's first token, for a prompt of `tokens`."""
        if 0.0 < seconds <= _MOST_SECONDS and now >= self._next_handoff:
            self._next_handoff = now + _HANDOFF_PAUSE
            self.pool.handed_over(_tokens(tokens), seconds)

    def handoff(self, tokens: int) -> float:
        """Seconds that a hand-off is expected to take; 0 until one was seen."""
        return self.pool.handoff(tokens)

    # Coming and going

    def begin(self) -> None:
        """Nothing is known of it but its pool."""
        self._pace.begin(self.pool.pace, 0.0)
        self._factor.begin(self.pool.factor, 0.0)
        self.pace, self.factor = self._pace.value, self._factor.value
        self.gap = self.gap_at = 0.0
        self._forget_legs()

    def follow_pace(self, pace: float) -> None:
        """Nothing is known of its pace; the pool's median is such."""
        self._pace.begin(pace, 0.0)
        self.pace = pace

    def follow_factor(self, factor: float) -> None:
        """Likewise for its factor."""
        self._factor.begin(factor, 0.0)
        self.factor = factor

    def left(self, now: float) -> None:
        """It is out of the rotation: what it had is lost."""
        self._left_at = now
        self._forget_legs()

    def returned(self, now: float) -> None:
        """It is back. After a short outage it is taken to be as it was; after a longer one it may be another engine."""
        away = 0.0 if self._left_at is None else now - self._left_at
        self._left_at = None
        if away > _FORGOTTEN:
            self.begin()
            return
        for mean in (self._pace, self._factor):
            mean.seen = min(mean.seen, _INHERITED)  # it may have changed, so new observations count for more

    def _forget_legs(self) -> None:
        self._given.clear()
        self._disturbed = 0.0
        self._work = self._legs = 0
        self._tokens = self._tokens_before = self._work_done = self._seconds = 0.0
        self.refresh()


def _tokens(count: int) -> int:
    """A count within bounds."""
    return int(count) if 0 <= count <= MOST_TOKENS else MOST_TOKENS if count > 0 else 0
