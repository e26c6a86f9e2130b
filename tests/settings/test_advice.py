"""Settings that are valid but probably a mistake."""

from __future__ import annotations

from typing import Any

import pytest
from pd_proxy.settings.advice import advise
from pd_proxy.settings.tree import build_settings

PAIR = {"prefill": ["p:1"], "decode": ["d:1"]}


def warned(**values: Any) -> list[tuple[str, str]]:
    return [(advice.setting, advice.text) for advice in advise(build_settings(values, {}, {}))]


@pytest.mark.parametrize(
    "values",
    [
        PAIR,
        {"mixed": ["m:1"]},
        {**PAIR, "host": "0.0.0.0", "api_keys": ["k"]},
        {**PAIR, "host": "::", "clients": [{"name": "a", "key": "k"}]},
        {**PAIR, "host": "localhost"},
        {**PAIR, "host": "127.8.9.1"},
        {**PAIR, "timeouts": {"handoff": 15}},
        {**PAIR, "timeouts": {"total": 10}},
        {**PAIR, "connector": "mooncake", "timeouts": {"handoff": 200}},
        {**PAIR, "kind": "sglang", "connector": "sglang"},
        {**PAIR, "kind": "tensorrt_llm", "connector": "tensorrt_llm"},
        {**PAIR, "kind": "sglang", "connector": "auto"},
        {"kind": "openai", "mixed": ["m:1"]},
        {"groups": [{"name": "g", **PAIR}]},
        {"connector": "p2p_nccl", "zmq": {"registrations": "10.0.0.9:1", "networks": ["10.0.0.0/8"]}},
        {"mixed": ["127.0.0.1:8000"], "port": 0},
        {"mixed": ["127.0.0.1:8000"], "host": "10.0.0.1", "api_keys": ["k"]},
    ],
)
def test_good_settings_get_no_warning(values: dict[str, Any]) -> None:
    assert warned(**values) == []


@pytest.mark.parametrize(
    ("values", "setting", "says"),
    [
        ({**PAIR, "host": "0.0.0.0"}, "host", "clients need no key"),
        ({**PAIR, "host": "10.0.0.1"}, "host", "clients need no key"),
        ({**PAIR, "host": "gateway.example"}, "host", "clients need no key"),
        ({**PAIR, "admin_key": "k", "api_keys": ["k"]}, "admin_key", "a client has the same key"),
        ({"prefill": ["p:1"]}, "prefill", "nothing will be answered"),
        ({"decode": ["d:1"]}, "decode", "decode computes every prompt itself"),
        ({"decode": ["d:1"], "fallback": "reject"}, "decode", "nothing will be answered"),
        ({}, "prefill", "no backend is configured"),
        ({"encode": ["e:1"]}, "encode", "no backend uses"),
        ({"groups": [{"name": "g", "decode": ["d:1"]}]}, "groups.0.decode", "no backend of group g"),
        ({"mixed": ["m:1"], "groups": [{"name": "g"}]}, "groups.0.name", "no backend of group g"),
        ({**PAIR, "timeouts": {"handoff": 31}}, "timeouts.handoff", "keep a hand-off for 30 s"),
        ({**PAIR, "timeouts": {"handoff": 16}}, "timeouts.handoff", "none is sent after half of it"),
        ({**PAIR, "timeouts": {"total": 10, "idle": 20}}, "timeouts.idle", "timeouts.total ends a request at 10 s"),
        ({**PAIR, "tokenizer": "t.json"}, "tokenizer", "no engine publishes any"),
        (
            {
                **PAIR,
                "kv_events": {"endpoint": "tcp://{host}:1"},
                "policy": dict.fromkeys(("prefill", "decode", "mixed"), "random"),
            },
            "kv_events.endpoint",
            "no policy uses",
        ),
        ({**PAIR, "kind": "sglang"}, "kind", "speak sglang, not nixl"),
        ({**PAIR, "connector": "tensorrt_llm"}, "connector", "only backends of kind tensorrt_llm"),
        ({"mixed": ["127.0.0.1:8000"]}, "mixed.0", "the address of this gateway itself"),
        ({"mixed": ["m:1", "localhost:8000"], "host": "::1"}, "mixed.1", "the address of this gateway itself"),
    ],
)
def test_probable_mistakes_get_one_warning_each(values: dict[str, Any], setting: str, says: str) -> None:
    ((about, text),) = warned(**values)
    assert about == setting
    assert says in text


def test_a_registration_interval_that_is_too_long_gets_a_warning() -> None:
    zmq = {"registrations": "10.0.0.9:1", "expiry": 2}
    (warning,) = warned(**PAIR, connector="p2p_nccl", zmq=zmq)
    assert warning[0] == "zmq.expiry"
