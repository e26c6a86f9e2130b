"""Findings: what is wrong with an engine or with a pair, and what to do about it.

Probes, warm-ups and `pd-proxy doctor` report the same findings with the same texts. The advice for each code is only
here. Findings are for operators, and so contain addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["fault", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        code: a word for metrics and programs; a key of `ADVICE`.
        severity: `fault`: an engine or a pair does not work as the settings say; `warning`: it works, but not as well
            as it could; `note`: information.
        backends: the URLs of the backends in question; of a pair, prefill's first.
        what: a description.
        advice: what to do, in one or two sentences.
    """

    code: str
    severity: Severity
    backends: tuple[str, ...]
    what: str
    advice: str


@dataclass(frozen=True, slots=True)
class HandoffState:
    """The result of a backend's last hand-off.

    Attributes:
        state: the result; `never` while none has been tried.
        peer: the URL of the other backend, or empty.
        at: when it was, by `time.monotonic`; 0 for never.
        finding: why it failed; where it worked, a finding about the engine that was made with it, or None.
    """

    state: Literal["ok", "failed", "never"] = "never"
    peer: str = ""
    at: float = 0.0
    finding: Finding | None = None


NEVER = HandoffState()

ADVICE: dict[str, str] = {
    # of one engine
    "refused": "Start the engine, or correct its host and port in the settings.",
    "unresolved": "Correct the host's name in the settings, or make this machine's resolver know it.",
    "unreachable": "Correct the address in the settings, or the route from this machine to that one.",
    "timeout": "Correct the address, open the firewall between this machine and that one, or wait until the engine has "
    "loaded its model. An engine that is only slow needs a longer health.timeout.",
    "speaks_tls": "Write the backend's URL with https://.",
    "no_tls": "Write the backend's URL with http://, or give the engine its certificate (--ssl-certfile).",
    "certificate": "Name the host as its certificate does, and have this machine trust the certificate's issuer "
    "(SSL_CERT_FILE names a file of trusted issuers).",
    "no_http": "Correct the port: that of the engine's API, not of its side channel or of another service.",
    "unhealthy": "Look at the engine's log: it is loading its model, leaving, or its process has failed and must be "
    "started again.",
    "no_engine": "Correct the address, or set `kind` to what answers there: vllm, sglang, tensorrt_llm, nim or openai.",
    "key_refused": "Set backend_api_key to the key that the engine was started with (--api-key).",
    "asleep": "Wake it: POST /wake_up at the engine, or POST /admin/wake_up at the gateway. One that is paused goes on "
    "with POST /resume at the engine.",
    "unregistered": "Have the engine register here: its proxy_ip and proxy_port are those of zmq.registrations.",
    "no_coordinates": "Start it as a prefill engine with this connector, and name the port of its bootstrap server "
    "under `locations` where it is not the default one.",
    "failed": "Look at the engine's log.",
    "no_models": "Correct the address, or `kind`: an engine lists its models at /v1/models.",
    # of a pair
    "no_params": "Start the prefill engine with the connector that the settings name (vLLM: --kv-transfer-config), or "
    "set `connector` to the one that it speaks.",
    "invalid_params": "Set `connector` to the protocol that the engines speak; both need the same one, of one version.",
    "prefill_failed": "Look at the prefill engine's log, and set `connector` to the protocol that it speaks.",
    "decode_failed": "Look at the decode engine's log: both engines need one version, model, block size and connector, "
    "and decode's machine must reach prefill's side of the hand-off.",
    "side_channel": "Give prefill's side of the hand-off an address that decode's machine reaches, and open its port.",
    "not_read": "Start the decode engine with the connector that the settings name (vLLM: --kv-transfer-config), or "
    "set `connector` to the one that it speaks. With kv_load_failure_policy: recompute, its log says why it could not "
    "fetch.",
    "stalled": "Decode's machine must reach prefill's side of the hand-off, and both engines need one connector. Their "
    "logs say which of them waits.",
    "wrong_connector": "Set `connector` to what the engine speaks, or start it with the one that the settings name.",
    "roles_swapped": "List it in the other pool, or start it in the role that the settings give it (vLLM: kv_role in "
    "--kv-transfer-config; SGLang: --disaggregation-mode).",
    "no_pair": "Have prefill and decode engines of each group serve one model, in one version, with one connector.",
    "inconclusive": "Try again: the prefill engine had the whole answer, and nothing was left to hand over.",
    # of several
    "models_differ": "Nothing, if that is meant: a request for a model goes to the engines that have it.",
    "versions_differ": "Run one version: with pair_revisions: strict, engines of different versions are not paired.",
    "blocks_differ": "Start both with one --block-size: the transfer may fail, and clients get decode's first token.",
    "contexts_differ": "Start them with one --max-model-len: /v1/models shows clients the shortest.",
    "parallel_differ": "Nothing, where the connector can transfer between unlike tensor-parallel sizes, as nixl can.",
    "uncached": "Start it with --enable-prefix-caching, unless its prompts have nothing in common.",
    "not_tried": "Raise --pairs to try more.",
    "cannot_try": "Start the gateway: its own warm-up tries them, and GET /admin/backends shows what came of it.",
    "side_unreachable": "Nothing, as long as decode's machine reaches it.",
    "nothing_to_serve": "Name prefill and decode backends, or mixed ones.",
}
"""What to do about each code."""

SIDE_ADVICE = {
    "nixl": "Set VLLM_NIXL_SIDE_CHANNEL_HOST on the prefill engine to an address of its own machine that decode's "
    "machine reaches, and open VLLM_NIXL_SIDE_CHANNEL_PORT there (5600, one more for each data-parallel rank).",
    "nixl_push": "Set VLLM_NIXL_SIDE_CHANNEL_HOST on the prefill engine, or `locations` here, to an address of "
    "prefill's machine that decode's machine reaches, and open its port (5600, one more for each data-parallel rank).",
    "mooncake": "Name prefill's bootstrap server (VLLM_MOONCAKE_BOOTSTRAP_PORT, 8998) under `locations` with an "
    "address that decode's machine reaches.",
    "sglang": "Name prefill's bootstrap server (--disaggregation-bootstrap-port, 8998) under `locations` with an "
    "address that decode's machine reaches.",
    "mooncake_ascend": "Have prefill call itself by an address that decode's machine reaches, and open its kv_port.",
}
"""The advice for `side_channel`, by connector, where the connector has settings for it."""

MEANING: dict[str, str] = {
    "refused": "nothing listens at its address",
    "unresolved": "its host has no address",
    "unreachable": "there is no way to its host",
    "timeout": "it does not answer in time",
    "speaks_tls": "it speaks TLS, and its URL says http",
    "no_tls": "it speaks no TLS, and its URL says https",
    "certificate": "its certificate is not trusted here",
    "no_http": "what listens there speaks no HTTP",
    "unhealthy": "its health check answers with an error of its own",
    "no_engine": "what answers there has no health check of this kind",
    "key_refused": "it wants another key",
    "asleep": "it sleeps, or is paused",
    "unregistered": "it has not told the gateway where its side of the hand-off is",
    "no_coordinates": "it does not say where its side of the hand-off is",
    "failed": "it is not up for another reason",
    "no_models": "it lists no models",
    "no_params": "prefill gives no hand-off",
    "invalid_params": "prefill's hand-off cannot be used",
    "prefill_failed": "prefill fails",
    "decode_failed": "decode fails with the hand-off",
    "side_channel": "decode cannot reach prefill's KV cache",
    "not_read": "decode does not read what prefill hands over",
    "stalled": "prefill and decode wait for each other",
    "wrong_connector": "an engine speaks another connector than the settings say",
    "roles_swapped": "an engine has another role than the settings say",
    "no_pair": "no two engines may hand over to each other",
    "inconclusive": "prefill had nothing to hand over",
    "models_differ": "engines of one group have different models",
    "versions_differ": "engines of one group have different versions",
    "blocks_differ": "prefill and decode engines of one group have different block sizes",
    "contexts_differ": "engines of one group have different context lengths",
    "parallel_differ": "prefill and decode engines of one group have different tensor-parallel sizes",
    "uncached": "a prefill engine has no prefix cache",
    "not_tried": "an engine was in none of the pairs that were tried",
    "cannot_try": "hand-offs cannot be tried from outside of a gateway",
    "side_unreachable": "a hand-off works, and its address cannot be reached from this machine",
    "nothing_to_serve": "the settings name too few backends",
}
"""What each code means. `/ready` shows these texts to everybody who reaches the port, so they contain no addresses."""


def found(code: str, what: str, *backends: str, severity: Severity = "fault", advice: str | None = None) -> Finding:
    """Make a finding with its code's advice.

    Arguments:
        advice: replaces the code's advice.
    """
    return Finding(code, severity, backends, what, ADVICE[code] if advice is None else advice)


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """The findings by severity, without duplicates. Those of one severity stay in their order."""
    return sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))
