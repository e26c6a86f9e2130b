"""The speeds of engines: learnt from their legs, and used to predict the time of a new leg.

Plain values; the time is passed in. The memory for an engine is fixed, except for two numbers for each outstanding leg.

**Prefill.** A leg that computes the last `u` tokens of a prompt of `p` costs `u + leg_tokens + u·(p - u/2)/growth`
tokens of work: `leg_tokens` is the fixed cost of a leg, and the last term is attention, which grows with the tokens
before. An engine does one token of work in `pace` seconds of busy time. `leg_tokens` and `growth` are learnt for the
pool, and the pace for each engine.

**Decode.** A step, which is the gap between two tokens of a stream, takes `factor · (a + b·sequences + c·tokens held)`.
`a`, `b` and `c` are learnt for the pool, and the factor for each engine.

Both fits are least squares over relative errors, with decaying weights, no negative coefficients, and a weak prior, so
that coefficients which the observations do not determine stay near it. A pace and a factor are decayed means of
observed over expected values. An observation is clipped to between half and twice the expected value (Huber 1964),
until several in a row lie beyond. So an outlier has little effect, and a change is followed within a few legs.
"""

from __future__ import annotations

from collections import deque
from math import exp, inf

from pd_proxy.fleet.fit import Mean
from pd_proxy.fleet.pool_speeds import CHUNK, FIRST_PACE, PoolSpeeds

MOST_TOKENS = 100_000_000
"""The most tokens of a prompt, or held by an engine. Greater numbers are clipped."""
_MOST_SEQUENCES = 100_000
_MOST_SECONDS = 3600.0  # for a leg, a token or a hand-off
_SLOWEST_PACE, _FASTEST_PACE = 1.0, 1e-8
_LEAST_FACTOR, _GREATEST_FACTOR = 1e-4, 1e4
_FULL_LEG = 512  # tokens from which a leg is a full observation of the pace
_MEMORY = 24.0  # the memory of a pace, in full legs; or `_BUSY_MEMORY`, where that is shorter
_BUSY_MEMORY = 15.0  # seconds of busy time
_MOST_GAIN = 0.2  # the greatest weight of one leg in the mean, whatever its length
_STEP_MEMORY = 16.0  # the memory of a factor, in streams
_INHERITED = 2.0  # the number of observations as which the pool's median counts for a new engine
_OVERDUE = 0.5  # seconds beyond twice the expected time after which a leg is considered stuck
_FORGOTTEN = 120.0  # seconds down after which an engine counts as a new one
_SILENT = 900.0  # seconds that the first leg is overdue after which outstanding work is no longer counted
_ALIKE = 0.08  # part of the pool's median factor by which an engine may differ and count as equally fast
_GAP_WEIGHT = 0.25  # the weight of a new gap in the mean gap
_WINDOW = 8.0  # seconds; the time constant of the recent prefill work of an engine that decodes
_MIXED = 1.0  # seconds after a prefill in which gaps may contain its chunks
_GAP_HOLDS = 30.0  # seconds for which an observed gap is used
_HANDOFF_PAUSE = 0.05  # seconds between two observed hand-offs; those between would add little
_OBSERVED = 0.01  # seconds of busy time that an observation of the pace has at least, since clocks are not exact
_ALONE = 0.25  # part of the expected time; a leg answered sooner was computed together with the one before


def join_pool(pool: PoolSpeeds) -> Speeds:
    """Make the speeds of an engine that joins a pool. They begin with the pool's median."""
    speeds = Speeds(pool)
    pool.add(speeds)
    speeds.begin()
    return speeds


class Speeds:
    """The speeds of one engine. Made by `join_pool`.

    Attributes:
        pool: the speeds of its pool.
        pace: the seconds of busy time for one token of work.
        factor: the time of its steps over the time by the pool's fit.
        free_at: when it is expected to have finished its outstanding legs.
        rest: the seconds of work that certainly remain, since only the first leg can be partly done. A new leg waits
            for about `max(free_at - now, rest)`.
        late_at: when the first outstanding leg is considered stuck; `inf` where there is none.
        step_base, step_token: the seconds of its step without requests, and the seconds that a token in flight adds.
        capacity: the tokens that its KV cache holds; `inf` while that is not known.
        gap: the recent seconds between two tokens of a stream; 0 until one was observed.
        gap_at: when a gap was last observed.
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
        self._given: deque[tuple[int, int]] = deque()  # uncached tokens and work of each outstanding leg, in order
        self._work = 0  # the sum of their work
        self._elsewhere = 0
        self._elsewhere_since = 0.0
        self._next_handoff = 0.0  # when the next one is observed
        self._since = -inf  # the time up to which busy time has been counted
        self._legs = 0  # legs of the present observation: those that were computed together
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
        """Note that a prefill leg was sent.

        Arguments:
            uncached: the tokens of its prompt that the engine is expected to compute.
            prompt: the tokens of its prompt; at least `uncached` is assumed.
        """
        if not 0 <= uncached <= prompt <= MOST_TOKENS:
            uncached, prompt = _tokens(uncached), max(_tokens(uncached), _tokens(prompt))
        given = self._given
        work = self.pool.work(uncached, prompt)
        if self.gap:  # it decodes as well
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
        self.free_at = now + seconds  # the same as `_plan` computes for a single leg
        self.rest = 0.0
        self.late_at = now + 2.0 * seconds + _OVERDUE

    def answered(self, believed: int, computed: int, prompt: int, now: float) -> None:
        """Note that a prefill leg has succeeded.

        Arguments:
            believed: the `uncached` that was passed when it was sent.
            computed: the tokens that the engine reports to have computed; `believed` where it reports nothing.
            prompt: the tokens of the prompt.
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
        """Note that a prefill leg has failed or was cancelled. It is no observation of the pace."""
        first = self._given[0][0] if self._given else None
        self._taken(believed)
        if first == _tokens(believed):
            self._since = now
        self._plan()

    def _taken(self, believed: int) -> None:
        """Remove a leg from the outstanding ones. Mostly it is the first."""
        given, believed = self._given, _tokens(believed)
        for index, (uncached, work) in enumerate(given):
            if uncached == believed:
                self._work -= work
                del given[index]
                return
        if given:  # no leg has this number; removing another one keeps the count from growing for ever
            self._work -= given.popleft()[1]

    def _learn(self) -> None:
        """Learn the pace from the legs since the last call, which were computed together or took very little time."""
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
        """The uncached tokens of the outstanding legs of other workers."""
        return self._elsewhere

    def note_elsewhere(self, tokens: int, since: float) -> None:
        """Set the outstanding prefill legs of other workers.

        Arguments:
            tokens: the uncached tokens of these legs; 0 where they have none.
            since: their `since`; the latest of several workers.
        """
        if tokens != self._elsewhere or since != self._elsewhere_since:
            if tokens < self._elsewhere and since > self._since and self._given:
                self._since = since  # before that, the engine has computed a leg of another worker
            self._elsewhere = _tokens(tokens)
            self._elsewhere_since = since
            self._plan()

    @property
    def since(self) -> float:
        """When this worker's first outstanding leg began to be computed; without one, when the last leg ended."""
        return self._since

    @property
    def outstanding(self) -> int:
        """The uncached tokens of this worker's outstanding legs."""
        return sum(uncached for uncached, _ in self._given)

    @property
    def prefills(self) -> bool:
        """Whether its pace was observed."""
        return self._pace.seen > 0.0

    @property
    def rate(self) -> float:
        """The uncached tokens that it prefills per second, of a prompt that is not long."""
        return 1.0 / self.pace

    def ahead(self, now: float) -> float:
        """The seconds of prefill work before a new leg.

        A leg that is late is expected to take as long again as it is late.
        """
        left = max(self.free_at - now, self.rest)
        late = now - self.late_at
        if late <= 0.0:
            return left
        return left + late if late < _SILENT else 0.0

    def disturbed(self, now: float) -> float:
        """The seconds of prefill that delay its streams: of the last 8 s or outstanding, whichever are more."""
        ahead = self.ahead(now)
        lately = self._disturbed * exp(min(0.0, self._disturbed_at - now) / _WINDOW) if self._disturbed else 0.0
        return ahead if ahead > lately else lately

    def seconds(self, uncached: int, prompt: int) -> float:
        """The seconds of a leg's own work.

        Arguments:
            uncached, prompt: the tokens to compute, and all tokens of the prompt.
        """
        return self.pool.work(uncached, prompt) * self.pace

    def refresh(self) -> None:
        """Compute the attributes that decisions read anew, since the pool's fits have changed."""
        self._expect_step(self.factor)
        self._plan()

    def _plan(self) -> None:
        """Compute `free_at`, `rest` and `late_at` anew."""
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
        """Note the mean gap between two tokens of a stream whose client has read as fast as they came.

        Arguments:
            seconds: the gap.
            sequences: the requests that the engine had then.
            kv_tokens: the tokens that these held, as `inflight_tokens` counts them.
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
            return  # the gap contains prefill work, which `disturbed` counts
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
        """Compute `step_base` and `step_token` anew. Engines whose factors differ by a few per cent count as equally
        fast. Otherwise an engine that is faster by chance would be sent requests until its steps reach their target."""
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
        """The expected seconds of a step.

        Arguments:
            sequences, kv_tokens: as for `stepped`.
        """
        return self.factor * self.pool.step(sequences, kv_tokens)

    @property
    def slowness(self) -> float:
        """The time of its steps over that of the pool's median engine."""
        return self.factor / self.pool.factor

    def handed_over(self, seconds: float, tokens: int, now: float) -> None:
        """Note the time of a hand-off to it, from prefill's answer to decode's first token, for a prompt of
        `tokens`."""
        if 0.0 < seconds <= _MOST_SECONDS and now >= self._next_handoff:
            self._next_handoff = now + _HANDOFF_PAUSE
            self.pool.handed_over(_tokens(tokens), seconds)

    def handoff(self, tokens: int) -> float:
        """The expected seconds of a hand-off; 0 until one was observed."""
        return self.pool.handoff(tokens)

    # Coming and going

    def begin(self) -> None:
        """Forget all observations, and take the values of the pool."""
        self._pace.begin(self.pool.pace, 0.0)
        self._factor.begin(self.pool.factor, 0.0)
        self.pace, self.factor = self._pace.value, self._factor.value
        self.gap = self.gap_at = 0.0
        self._forget_legs()

    def follow_pace(self, pace: float) -> None:
        """Take the pool's median pace, since no pace of its own was observed."""
        self._pace.begin(pace, 0.0)
        self.pace = pace

    def follow_factor(self, factor: float) -> None:
        """Take the pool's median factor, since no factor of its own was observed."""
        self._factor.begin(factor, 0.0)
        self.factor = factor

    def left(self, now: float) -> None:
        """Forget its outstanding legs, since the engine is down."""
        self._left_at = now
        self._forget_legs()

    def returned(self, now: float) -> None:
        """Note that it is up again. After a long outage it may be another engine, so its observations are forgotten."""
        away = 0.0 if self._left_at is None else now - self._left_at
        self._left_at = None
        if away > _FORGOTTEN:
            self.begin()
            return
        for mean in (self._pace, self._factor):
            mean.seen = min(mean.seen, _INHERITED)  # the engine may have changed, so new observations get more weight

    def _forget_legs(self) -> None:
        self._given.clear()
        self._disturbed = 0.0
        self._work = self._legs = 0
        self._tokens = self._tokens_before = self._work_done = self._seconds = 0.0
        self.refresh()


def _tokens(count: int) -> int:
    """A count of tokens, clipped to its bounds."""
    return int(count) if 0 <= count <= MOST_TOKENS else MOST_TOKENS if count > 0 else 0
