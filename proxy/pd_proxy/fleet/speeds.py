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
from collections.abc import Iterable
from math import exp, inf
from statistics import median

MOST_TOKENS = 100_000_000
"""Tokens of a prompt, or held by an engine; what says more is wrong."""
_MOST_SEQUENCES = 100_000
_MOST_SECONDS = 3600.0  # of a leg, a token or a hand-off
_PACE = 1 / 8000  # seconds; until an engine of the pool has prefilled anything
_SLOWEST_PACE, _FASTEST_PACE = 1.0, 1e-8
_LEAST_FACTOR, _GREATEST_FACTOR = 1e-4, 1e4
_STEP = (0.008, 0.00005, 0.00000004)  # seconds: a step, a sequence and a token held; an 8B model on one good GPU
_HANDOFF = (0.005, 0.000001, 1.0)  # seconds: a hand-off, a token: 100 kB at 100 GB/s
_LEG = (100.0, 1.0, 1 / 32768)  # tokens of work: a leg, a token, and a token for each one before it
_GREATEST_GROWTH = 1e12
_CHUNK = 8192  # tokens: legs that are computed in one step of the engine are answered together
_FULL_LEG = 512  # tokens: a shorter leg says less of the pace
_MEMORY = 24.0  # full legs
_BUSY_MEMORY = 15.0  # seconds of busy time; whichever is shorter
_MOST_GAIN = 0.2  # of one leg, however long
_STEP_MEMORY = 16.0  # streams
_FIT_MEMORY = 256  # observations
_RIDGE = 0.1  # the prior's weight, in observations
_LEARNT = 64  # observations
_FREQUENT = 8  # observations between two solutions of a fit
_FEW = 2.0  # full legs (streams): until then anything is believed
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


class Fit:
    """Least squares of `y` over three features: decayed, weighted by relative error, without negative coefficients.

    Arguments:
        scales: what a coefficient may be, by order of magnitude.
        prior: what it is until seen, in these units.
    Attributes:
        coefficients: of the features.
        seen: observations so far.
    """

    __slots__ = ("_a", "_b", "_prior", "_scales", "coefficients", "seen")

    def __init__(self, scales: tuple[float, float, float], prior: tuple[float, float, float]) -> None:
        self._scales, self._prior = scales, prior
        self._a = [0.0] * 6  # 00 01 02 11 12 22
        self._b = [0.0] * 3
        self.coefficients = tuple(s * p for s, p in zip(scales, prior, strict=True))
        self.seen = 0

    def note(self, x: float, y: float, z: float, value: float, expected: float, every: int = _FREQUENT) -> bool:
        """One observation: `value` where the features were so, and by the present fit `expected`.

        Returns whether the fit was solved anew, as it is for one observation of `every`.
        """
        weight = 1.0 / expected
        sx, sy, sz = self._scales
        x, y, z = x * sx * weight, y * sy * weight, z * sz * weight
        target = min(4.0, max(0.25, value * weight))
        keep = 1.0 - 1.0 / _FIT_MEMORY
        a, b = self._a, self._b
        a[0] = a[0] * keep + x * x
        a[1] = a[1] * keep + x * y
        a[2] = a[2] * keep + x * z
        a[3] = a[3] * keep + y * y
        a[4] = a[4] * keep + y * z
        a[5] = a[5] * keep + z * z
        b[0] = b[0] * keep + x * target
        b[1] = b[1] * keep + y * target
        b[2] = b[2] * keep + z * target
        self.seen += 1
        if self.seen % every:
            return False
        self._solve()
        return True

    def _solve(self) -> None:
        a00, a01, a02, a11, a12, a22 = self._a
        matrix = [[a00 + _RIDGE, a01, a02], [a01, a11 + _RIDGE, a12], [a02, a12, a22 + _RIDGE]]
        right = [b + _RIDGE * p for b, p in zip(self._b, self._prior, strict=True)]
        kept = [0, 1, 2]
        while kept:  # the most negative one is taken for zero, and the others solved again
            found = _solved([[matrix[i][j] for j in kept] for i in kept], [right[i] for i in kept])
            least = min(range(len(kept)), key=found.__getitem__)
            if found[least] >= 0:
                solution = dict(zip(kept, found, strict=True))
                self.coefficients = tuple(s * solution.get(n, 0.0) for n, s in enumerate(self._scales))
                return
            del kept[least]


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The solution of a small positive definite system, by elimination."""
    size = len(right)
    for column in range(size):
        pivot = matrix[column][column]
        for row in range(column + 1, size):
            share = matrix[row][column] / pivot
            for other in range(column, size):
                matrix[row][other] -= share * matrix[column][other]
            right[row] -= share * right[column]
    found = [0.0] * size
    for row in reversed(range(size)):
        rest = sum(matrix[row][other] * found[other] for other in range(row + 1, size))
        found[row] = (right[row] - rest) / matrix[row][row]
    return found


class Mean:
    """A decayed mean of observed over expected, which single observations move little.

    Attributes:
        value: the mean.
        seen: observations that it rests on; small ones count in part.
    """

    __slots__ = ("_beyond", "_memory", "seen", "value")

    def __init__(self, value: float, memory: float) -> None:
        self.value = value
        self.seen = 0.0
        self._memory = memory
        self._beyond = 0  # observations in a row that were much more (or, negative, much less) than expected

    def note(self, ratio: float, share: float = 1.0, gain: float = 0.0) -> None:
        """One observation.

        Arguments:
            ratio: observed over what `value` had one expect.
            share: of a full observation, in (0, 1].
            gain: its weight in the mean, at least.
        """
        seen = self.seen if self.seen < self._memory else self._memory
        own = 2.0 * share / (seen + 2.0 * share)  # the later half counts for three quarters
        if own > gain:
            gain = own
        self.seen = seen + share
        if 0.5 <= ratio <= 2.0:
            self._beyond = 0
            self.value *= 1.0 + gain * (ratio - 1.0)
            return
        bound = 2.0 ** (1 + min(abs(self._beyond), 5)) if seen >= _FEW else 64.0
        self._beyond = max(0, self._beyond) + 1 if ratio > 2.0 else min(0, self._beyond) - 1
        if abs(self._beyond) > 2:  # it is another engine than it was
            gain, self.seen = max(gain, 0.5 * share), min(self.seen, _FEW)
        # In logarithms: steps up and down are of one size.
        self.value *= min(bound, max(1.0 / bound, ratio)) ** gain

    def begin(self, value: float, seen: float) -> None:
        """Begin anew."""
        self.value, self.seen, self._beyond = value, seen, 0

    def bound(self, least: float, greatest: float) -> float:
        """Keep the value within bounds; returns it."""
        value = self.value
        if not least <= value <= greatest:
            self.value = value = least if value < least else greatest
        return value


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
        self._members: list[Speeds] = []
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

    def join(self) -> Speeds:
        """A new engine's, at the pool's median."""
        speeds = Speeds(self)
        self._members.append(speeds)
        speeds.begin()
        return speeds

    def leave(self, speeds: Speeds) -> None:
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
        return max(_FREQUENT, len(self._members))

    @property
    def pace(self) -> float:
        """The median of the engines' paces; a guess until one has prefilled."""
        return _median((s.pace for s in self._members if s.prefills), _PACE)

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
        if self._turn & 3 and self._shape.seen > _LEARNT and expected < _CHUNK:  # what is known well
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
        self._tokens_each += (each - self._tokens_each) / min(self._step.seen + 1, _FIT_MEMORY)
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


class Speeds:
    """One engine's. Made by `PoolSpeeds.join`.

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
        self._pace = Mean(_PACE, _MEMORY)
        self._factor = Mean(1.0, _STEP_MEMORY)
        self._disturbed = self._disturbed_at = 0.0
        self._undisturbed_at = -inf
        self._left_at: float | None = None
        self.pace = _PACE
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

    def told_elsewhere(self, tokens: int, since: float) -> None:
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
        front = min(work, first if first > _CHUNK else _CHUNK)
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


def _median(values: Iterable[float], default: float) -> float:
    found = list(values)
    return median(found) if found else default
