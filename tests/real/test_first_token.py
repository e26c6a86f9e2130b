"""The first token is sent when prefill has it, and the answer is the one that decode gives in the ordinary way.

Both ways use the same two engines. A decode engine that was handed too few blocks would be dead afterwards; the last
test checks that all live. The time to the first token is printed (`-s`), and bounded.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from .bed import Bed
from .engines import BLOCK_SIZE
from .gateway import Gateway, serving
from .processes import wait_until
from .questions import Api, body_for, prompt_of

pytestmark = pytest.mark.real

LENGTH = 24
PROMPTS = 200
TTFT_RATIO = 0.6
"""The bound on the median time to the first token, relative to the ordinary way's."""
USAGE = {"include_usage": True}
RUNNING_USAGE = {"include_usage": True, "continuous_usage_stats": True}
TOOLS = [{"type": "function", "function": {"name": "weigh", "parameters": {"type": "object", "properties": {}}}}]
EOS = 2
CLIENT = httpx.Client(trust_env=False)
"""One client for all, since making one takes longer than a request."""


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt, asked in one way."""

    number: int
    api: Api
    stream: bool
    tokens: int

    def body(self) -> dict[str, Any]:
        rng = random.Random(self.number)
        more: dict[str, Any] = {"max_tokens": rng.choice([2, LENGTH, LENGTH, LENGTH]), "return_token_ids": True}
        if rng.random() < 0.3:
            more |= {"logprobs": True, "top_logprobs": 2} if self.api is Api.CHAT else {"logprobs": 2}
        if self.stream:
            more |= {"stream": True, "stream_options": rng.choice([USAGE, USAGE, RUNNING_USAGE])}
        return body_for(self.api, prompt_of(self.tokens, f"first token {self.number}"), **more)


def cases() -> list[Case]:
    """Prompts of random lengths; each offset in a block occurs, in each API, streamed and not."""
    rng = random.Random("first token")
    found = []
    for number in range(PROMPTS):
        api = (Api.CHAT, Api.COMPLETIONS)[number % 2]
        offset = number // 4 % BLOCK_SIZE
        found.append(Case(number, api, number % 4 > 1, offset + 1 + BLOCK_SIZE * rng.randrange(12)))
    return found


def asked(url: str, api: Api, body: dict[str, Any]) -> tuple[str, float]:
    """An answer's text as it came, and the seconds to the first token of a stream."""
    started = time.perf_counter()
    first, text = 0.0, ""
    with CLIENT.stream("POST", url + api.value, json=body, timeout=60) as response:
        for part in response.iter_text():
            text += part
            if not first and ('"content":"' in part.replace('"content":""', "") or '"text":"' in part):
                first = time.perf_counter() - started
        assert response.status_code == 200, text
    return text, first


def shown(text: str) -> list[Any]:
    """An answer event by event, without the members that differ between any two answers; numbers to the fourth
    digit."""
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    payloads = [
        json.loads(event, parse_float=lambda f: round(float(f), 3)) if event != "[DONE]" else 0 for event in events
    ]
    heads = {(event["id"], event["created"]) for event in payloads if event}
    assert len(heads) == 1, heads
    for event in payloads:
        if event:
            event["id"] = event["created"] = 0
            event.pop("prompt_text", None)
            for choice in event["choices"]:
                for name in ("prompt_token_ids", "token_ids"):
                    if choice.get(name, 0) is None:
                        del choice[name]
    return payloads


def content_of(payloads: list[Any]) -> dict[str, Any]:
    """The content of an answer, however many events it took: an engine that is late puts two tokens into one event."""
    all_of: dict[str, Any] = {
        "text": "",
        "ids": [],
        "prompts": [],
        "logprobs": [],
        "finish": [],
        "roles": 0,
        "members": set(),
    }
    for event in filter(None, payloads):
        all_of["members"] |= event.keys()
        all_of["prompts"] += event.get("prompt_token_ids") or []
        all_of["usage"] = event.get("usage") or all_of.get("usage")
        for choice in event["choices"]:
            all_of["members"] |= choice.keys()
            part = choice.get("delta") or choice.get("message") or choice
            all_of["text"] += part.get("content") or part.get("text") or ""
            all_of["roles"] += "role" in part
            all_of["ids"] += choice.get("token_ids") or []
            all_of["prompts"] += choice.get("prompt_token_ids") or []
            found = choice["logprobs"] or {}
            all_of["logprobs"] += found.get("content") or [*zip(*(found[name] for name in sorted(found)), strict=True)]
            all_of["finish"] += [(choice["finish_reason"], choice.get("stop_reason"))] * bool(choice["finish_reason"])
    return all_of


EXACT = 'first_tokens_total{reason="exact",source="prefill"}'


def counts(gateway: Gateway) -> dict[str, float]:
    return {name: value for name, value in gateway.metrics().items() if name.startswith("first_tokens_total")}


@pytest.fixture(scope="module")
def ordinary(bed: Bed, logs: Path) -> Iterator[Gateway]:
    with serving(bed.prefill.url, bed.decode.url, logs / "gateway-ordinary.log", "--first-token", "decode") as started:
        yield started


@pytest.fixture(scope="module")
def ahead(bed: Bed, logs: Path) -> Iterator[Gateway]:
    with serving(bed.prefill.url, bed.decode.url, logs / "gateway-ahead.log") as started:
        yield started


def test_the_answer_is_the_ordinary_one_at_every_offset_in_a_block(bed: Bed, ordinary: Gateway, ahead: Gateway) -> None:
    times: dict[str, list[float]] = {"ordinary": [], "ahead": []}
    otherwise_cut = 0
    for case in cases():
        # A cache of its own for each way: a decode engine that has the prompt already pulls nothing, and would prove
        # nothing.
        answers, firsts = {}, {}
        exact = counts(ahead).get(EXACT, 0)
        for name, gateway in (("ordinary", ordinary), ("ahead", ahead)):
            salted = {**case.body(), "cache_salt": f"{name}{case.number}"}
            text, first = asked(gateway.url, case.api, salted)
            answers[name] = shown(text)
            firsts[name] = first
        if case.stream and counts(ahead).get(EXACT, 0) > exact:  # of the others, no first token is early
            for name, first in firsts.items():
                times[name].append(first)
        assert content_of(answers["ahead"]) == content_of(answers["ordinary"]), case
        otherwise_cut += answers["ahead"] != answers["ordinary"]
    seen = counts(ahead)
    print(f"\nfirst tokens: {seen}; {otherwise_cut} streams were cut into other events")
    assert otherwise_cut <= PROMPTS * 0.03
    given = seen[EXACT]
    whole = seen.get('first_tokens_total{reason="whole",source="prefill"}', 0)
    assert given + whole >= PROMPTS * 0.7
    assert seen['first_tokens_total{reason="full_blocks",source="decode"}'] >= 2
    assert sum(seen.values()) == PROMPTS
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["ahead"] / medians["ordinary"]
    print(f"median time to the first token: {medians['ordinary'] * 1000:.1f} ms the ordinary way, "
          f"{medians['ahead'] * 1000:.1f} ms this way: {ratio:.2f}")  # fmt: skip
    assert bed.prefill.is_healthy() and bed.decode.is_healthy()
    assert ratio <= TTFT_RATIO


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
@pytest.mark.parametrize(
    "more",
    [
        {"min_tokens": 9},
        {"repetition_penalty": 1.3},
        {"logit_bias": {"100": 5.0}},
        {"allowed_token_ids": list(range(300, 500))},
        {"seed": 5},
        {"ignore_eos": True},
        {"stop_token_ids": [300, 301]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_answers_with_options_that_depend_on_the_tokens_alone_are_the_ordinary_ones_too(
    bed: Bed, ordinary: Gateway, ahead: Gateway, api: Api, stream: bool, more: dict[str, Any]
) -> None:
    options = {"stream": True, "stream_options": USAGE} if stream else {}
    body = body_for(api, prompt_of(52, f"alone {more}"), **options, **more)
    answers = [
        shown(asked(gateway.url, api, {**body, "cache_salt": gateway.url[-5:]})[0]) for gateway in (ordinary, ahead)
    ]
    assert content_of(answers[0]) == content_of(answers[1])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_an_answer_that_ends_with_its_first_token_needs_no_decode(
    bed: Bed, ordinary: Gateway, ahead: Gateway, api: Api, stream: bool
) -> None:
    options = {"stream": True, "stream_options": USAGE} if stream else {}
    body = body_for(api, prompt_of(60, "ends"), **options, allowed_token_ids=[EOS])
    expected = shown(asked(ordinary.url, api, {**body, "cache_salt": "ordinary"})[0])
    wait_until(lambda: bed.decode.is_idle() and bed.prefill.is_idle(), 10, "both engines to be idle")
    before, generated = counts(ahead), bed.decode.metrics()["generation_tokens_total"]
    assert shown(asked(ahead.url, api, {**body, "cache_salt": "ahead"})[0]) == expected
    whole = 'first_tokens_total{reason="whole",source="prefill"}'
    assert counts(ahead)[whole] == before.get(whole, 0) + 1
    wait_until(bed.prefill.is_idle, 10, "prefill to hold no block")  # its lease is 30 s
    assert bed.decode.metrics()["generation_tokens_total"] == generated


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("api", Api, ids=lambda api: api.name.lower())
def test_a_request_for_one_token_has_no_hand_off(
    bed: Bed, ordinary: Gateway, ahead: Gateway, api: Api, stream: bool
) -> None:
    scores = {"logprobs": True, "top_logprobs": 2} if api is Api.CHAT else {"logprobs": 2}
    options = {"stream": True, "stream_options": USAGE} if stream else {}
    body = body_for(api, prompt_of(64, "one"), **options, **scores, max_tokens=1)
    expected = shown(asked(ordinary.url, api, {**body, "cache_salt": "ordinary"})[0])
    before = bed.decode.metrics()
    assert shown(asked(ahead.url, api, {**body, "cache_salt": "ahead"})[0]) == expected
    wait_until(bed.prefill.is_idle, 5, "prefill to hold no block")
    after = bed.decode.metrics()
    assert after["prompt_tokens_total"] == before["prompt_tokens_total"]


@pytest.mark.parametrize(
    ("api", "more", "why"),
    [
        (Api.CHAT, {"presence_penalty": 1.5}, "penalties"),
        (Api.COMPLETIONS, {"temperature": 0.8, "seed": 5}, "seed"),
        (Api.CHAT, {"structured_outputs": {"regex": "[a-z]{3}[0-9]{60}"}}, "structured_output"),
        (Api.COMPLETIONS, {"stop": ["kanakana"]}, "stop"),
        (Api.COMPLETIONS, {"logprobs": 1, "stream": True}, "logprobs"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_requests_that_are_not_exact_get_their_first_token_from_decode(
    ahead: Gateway, api: Api, more: dict[str, Any], why: str
) -> None:
    name = f'first_tokens_total{{reason="{why}",source="decode"}}'
    before = counts(ahead).get(name, 0)
    asked(ahead.url, api, body_for(api, prompt_of(54, why), **more))
    assert counts(ahead)[name] == before + 1


def test_after_all_requests_the_engines_live_and_hold_nothing(bed: Bed) -> None:
    assert bed.prefill.is_healthy() and bed.decode.is_healthy()
    wait_until(lambda: bed.prefill.is_idle() and bed.decode.is_idle(), 10, "both engines to hold nothing")
