"""Two online estimators: least squares over three features, and a robust mean.

In both the weight of observations decays with their age, and a single observation has little influence. An observation
is clipped to between half and twice the expected value (Huber 1964), until several in a row lie beyond on the same
side.
"""

from __future__ import annotations

FIT_MEMORY = 256  # observations
_RIDGE = 0.1  # the prior's weight, in observations
FREQUENT = 8  # observations between two solutions of a fit
_FEW = 2.0  # observations before which a mean is not clipped


class Fit:
    """Least squares over three features: decayed, weighted by relative error, without negative coefficients.

    Arguments:
        scales: the order of magnitude of each coefficient.
        prior: the coefficients before any observation, in units of `scales`.
    Attributes:
        coefficients: the coefficients of the features.
        seen: the number of observations.
    """

    __slots__ = ("_a", "_b", "_prior", "_scales", "coefficients", "seen")

    def __init__(self, scales: tuple[float, float, float], prior: tuple[float, float, float]) -> None:
        self._scales, self._prior = scales, prior
        self._a = [0.0] * 6  # 00 01 02 11 12 22
        self._b = [0.0] * 3
        self.coefficients = tuple(s * p for s, p in zip(scales, prior, strict=True))
        self.seen = 0

    def note(self, x: float, y: float, z: float, value: float, expected: float, every: int = FREQUENT) -> bool:
        """Add an observation.

        Arguments:
            x, y, z: the features.
            value: the observed value.
            expected: the value by the present coefficients.
            every: solve the fit anew after so many observations.
        Returns:
            Whether the fit was solved anew.
        """
        weight = 1.0 / expected
        sx, sy, sz = self._scales
        x, y, z = x * sx * weight, y * sy * weight, z * sz * weight
        target = min(4.0, max(0.25, value * weight))
        keep = 1.0 - 1.0 / FIT_MEMORY
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
        while kept:  # the most negative coefficient is set to zero, and the others are solved again
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
    """A decayed mean that follows the ratio of observed to expected values, and on which one observation has little
    effect.

    Attributes:
        value: the mean.
        seen: the number of observations; short ones count in part.
    """

    __slots__ = ("_beyond", "_memory", "seen", "value")

    def __init__(self, value: float, memory: float) -> None:
        self.value = value
        self.seen = 0.0
        self._memory = memory
        self._beyond = 0  # observations in a row far above the expected value (positive), or far below it (negative)

    def note(self, ratio: float, share: float = 1.0, gain: float = 0.0) -> None:
        """Add an observation.

        Arguments:
            ratio: the observed value over the one that `value` predicts.
            share: its part of a full observation, in (0, 1].
            gain: the least weight that it has in the mean.
        """
        seen = self.seen if self.seen < self._memory else self._memory
        own = 2.0 * share / (seen + 2.0 * share)  # the later half of the observations has three quarters of the weight
        if own > gain:
            gain = own
        self.seen = seen + share
        if 0.5 <= ratio <= 2.0:
            self._beyond = 0
            self.value *= 1.0 + gain * (ratio - 1.0)
            return
        bound = 2.0 ** (1 + min(abs(self._beyond), 5)) if seen >= _FEW else 64.0
        self._beyond = max(0, self._beyond) + 1 if ratio > 2.0 else min(0, self._beyond) - 1
        if abs(self._beyond) > 2:  # the value has changed, so it is learnt anew
            gain, self.seen = max(gain, 0.5 * share), min(self.seen, _FEW)
        # The step is taken in logarithms, so that steps up and down have the same size.
        self.value *= min(bound, max(1.0 / bound, ratio)) ** gain

    def begin(self, value: float, seen: float) -> None:
        """Restart from a value that counts as `seen` observations."""
        self.value, self.seen, self._beyond = value, seen, 0

    def bound(self, least: float, greatest: float) -> float:
        """Clip the value to bounds, and return it."""
        value = self.value
        if not least <= value <= greatest:
            self.value = value = least if value < least else greatest
        return value
