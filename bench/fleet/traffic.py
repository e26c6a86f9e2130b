"""Kinds of traffic: traces of requests, made from a seed."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from random import Random

from bench.fleet.jobs import Request
from bench.fleet.prompts import Part, Prompt

TTFT = 2.0
"""Seconds: the SLO of requests that a person waits for."""
TPOT = 0.050
DOCUMENT_TTFT = 60.0

Trace = list[Request]
Stems = Callable[[], int]


def stems(rng: Random) -> Stems:
    """Numbers of texts that no request has had before."""
    return lambda: rng.getrandbits(60)


def lognormal(rng: Random, median: float, sigma: float, least: int, most: int) -> int:
    """A length: most are near the median, a few much longer."""
    return max(least, min(most, round(exp(rng.gauss(log(median), sigma)))))


def zipf(rng: Random, count: int, power: float) -> Callable[[], int]:
    """Draws from 0 to `count` - 1; small numbers are more frequent."""
    weights = [1.0 / (rank + 1) ** power for rank in range(count)]
    bounds, total = [], 0.0
    for weight in weights:
        total += weight
        bounds.append(total)
    places = range(count)
    return lambda: rng.choices(places, cum_weights=bounds)[0]


def arrivals(rng: Random, rate: float, count: int, start: float = 0.0) -> list[float]:
    """Times of a Poisson process."""
    times, now = [], start
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def limit(rng: Random, output: int) -> int | None:
    """`max_tokens` as clients set it: half of them do not, the others set more than they need."""
    return None if rng.random() < 0.5 else max(output, rng.choice((256, 512, 1024, 2048, 4096)))


def plain(rng: Random, count: int, rate: float, *, prompt: int = 3584, output: int = 1536, tpot: float = TPOT) -> Trace:
    """Prompts of one length that share nothing."""
    new = stems(rng)
    return [
        Request(time, Prompt([Part(new(), prompt)]), output, TTFT, tpot, output) for time in arrivals(rng, rate, count)
    ]


def chat(rng: Random, times: list[float], *, prompt: float = 800, output: float = 220) -> Trace:
    """Short prompts of many lengths that share nothing."""
    new, found = stems(rng), []
    for time in times:
        written = lognormal(rng, output, 0.7, 8, 2000)
        length = lognormal(rng, prompt, 0.8, 40, 8000)
        found.append(Request(time, Prompt([Part(new(), length)]), written, TTFT, TPOT, limit(rng, written)))
    return found


def documents(rng: Random, times: list[float], *, length: int = 100_000) -> Trace:
    """Long documents with a question each."""
    new, found = stems(rng), []
    for time in times:
        tokens = round(length * rng.uniform(0.7, 1.2))
        found.append(Request(time, Prompt([Part(new(), tokens)]), rng.randint(150, 450), DOCUMENT_TTFT, TPOT, 1024))
    return found


def mixed(rng: Random, count: int, rate: float, every: float) -> Trace:
    """Chat, and a document at intervals."""
    talk = chat(rng, arrivals(rng, rate, count))
    end = talk[-1].time
    long = documents(rng, [time for time in arrivals(rng, 1 / every, int(2 * end / every)) if time < end])
    return sorted([*talk, *long], key=lambda request: request.time)


def tenants(
    rng: Random,
    count: int,
    rate: float,
    *,
    prompts: int,
    length: int,
    power: float = 0.7,
    user: float = 300,
    output: float = 180,
    ratio: Callable[[], float] = lambda: 4.0,
    adapters: int = 0,
) -> Trace:
    """System prompts, of which each request has one, with a question of its own.

    Arguments:
        prompts, length, power: how many system prompts, of how many tokens, drawn by Zipf's law with this exponent.
        ratio: bytes of a token, for a system prompt and its questions.
        adapters: LoRA adapters; every system prompt belongs to one.
    """
    new = stems(rng)
    systems = [(new(), lognormal(rng, length, 0.3, 256, 4 * length), ratio()) for _ in range(prompts)]
    draw, found = zipf(rng, prompts, power), []
    for time in arrivals(rng, rate, count):
        which = draw()
        stem, tokens, size = systems[which]
        written = lognormal(rng, output, 0.6, 8, 1500)
        asked = lognormal(rng, user, 0.7, 16, 4000)
        adapter = f"adapter-{which % adapters}" if adapters else ""
        prompt = Prompt([Part(stem, tokens, size), Part(new(), asked, size)], adapter)
        found.append(Request(time, prompt, written, TTFT, TPOT, limit(rng, written), b"", adapter))
    return found


def agents(
    rng: Random,
    count: int,
    rate: float,
    *,
    tools: int = 6,
    tool_tokens: int = 3000,
    turns: tuple[int, int] = (4, 14),
    user: float = 700,
    output: float = 200,
    pause: float = 4.0,
    ratio: Callable[[], float] = lambda: 4.0,
) -> Trace:
    """Sessions: a tool prompt, then turns, each of which begins with everything before it.

    Arguments:
        count: requests in total, approximately.
        rate: sessions that begin in a second.
        tools, tool_tokens: number of different tool prompts, and their length.
        pause: mean seconds between an answer and the next turn.
    """
    new, found, made, now = stems(rng), [], 0, 0.0
    shared = [(new(), lognormal(rng, tool_tokens, 0.15, 128, 2 * tool_tokens), ratio()) for _ in range(tools)]
    while made < count:
        now += rng.expovariate(rate)
        tool, tool_length, size = rng.choice(shared)
        own, length, last = new(), 0, None
        name = b"%x" % own if rng.random() < 0.5 else b""
        for turn in range(rng.randint(*turns)):
            length += lognormal(rng, user, 0.7, 16, 6000)
            written = lognormal(rng, output, 0.7, 8, 1500)
            prompt = Prompt([Part(tool, tool_length, size), Part(own, length, size)])
            request = Request(now, prompt, written, TTFT, TPOT, limit(rng, written), name)
            length += written
            made += 1
            if last is None:
                found.append(request)
            else:
                last.follow, last.pause = request, rng.expovariate(1 / pause)
            last = request
            if turn and tool_length + length > 20_000:
                break
    return found


def bursts(rng: Random, count: int, rate: float, *, times: float, every: float, lasting: float) -> Trace:
    """Chat with bursts at regular intervals.

    Arguments:
        rate: requests/s between bursts; in a burst, `times` as many.
        every, lasting: seconds from a burst to the next one, and of one burst.
    """
    moments: list[float] = []
    now = 0.0
    while len(moments) < count:
        now += rng.expovariate(rate * times)
        if now % every > every - lasting or rng.random() < 1 / times:
            moments.append(now)
    return chat(rng, moments, prompt=1400, output=150)


def hot(rng: Random, count: int, rate: float, *, share: float, length: int) -> Trace:
    """Requests with one prefix, more than one engine can serve, and requests without it."""
    new, found = stems(rng), []
    stem = new()
    for time in arrivals(rng, rate, count):
        written = lognormal(rng, 150, 0.6, 8, 1200)
        parts = [Part(new(), lognormal(rng, 900, 0.6, 32, 6000))]
        if rng.random() < share:
            parts = [Part(stem, length), *parts]
        found.append(Request(time, Prompt(parts), written, TTFT, TPOT, limit(rng, written)))
    return found


def pressure(rng: Random, count: int, rate: float) -> Trace:
    """Answers of very different length, so that KV caches fill unpredictably."""
    new, found = stems(rng), []
    for time in arrivals(rng, rate, count):
        long = rng.random() < 0.25
        written = lognormal(rng, 2500 if long else 150, 0.5, 8, 6000)
        prompt = Prompt([Part(new(), lognormal(rng, 1800, 0.8, 64, 12_000))])
        found.append(Request(time, prompt, written, 3.0, TPOT, None if rng.random() < 0.6 else 8192))
    return found


def languages(rng: Random) -> Callable[[], float]:
    """Texts with different numbers of bytes in a token: code, Chinese, English, JSON."""
    return lambda: rng.choice((2.5, 3.0, 4.5, 6.0))
