"""The groups of settings for requests: placement, time, size, retries, admission and clients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pd_proxy.settings.addresses import Origins
from pd_proxy.settings.secrets import Secret
from pd_proxy.settings.types import NAME, Group, PolicyName, Seconds, SecondsOrZero, parsed_list


class Policies(Group):
    """How a backend is chosen within each pool."""

    prefill: PolicyName = Field("auto", description="policy of the prefill pool")
    decode: PolicyName = Field("auto", description="policy of the decode pool")
    mixed: PolicyName = Field("auto", description="policy of the mixed pool")
    session_header: str = Field(
        "x-session-id",
        pattern=r"^[a-z0-9_.-]{1,64}$",
        description="header that names a request's session, for the policy session; without it members of the body do",
    )

    @field_validator("session_header", mode="before")
    @classmethod
    def _in_any_case(cls, name: object) -> object:
        return name.lower() if isinstance(name, str) else name


class Targets(Group):
    """The latency that clients should get ([operating](operating.md#targets)). Placement uses the targets; with
    `admission.slo` admission does too. A client of `clients` may have its own."""

    ttft: Seconds | None = Field(None, description="seconds within which a request should have its first token")
    tpot: Seconds | None = Field(None, description="seconds that each further token should take, on average")


class Timeouts(Group):
    """Seconds. Each covers one thing, so that none of them ends a healthy request."""

    connect: Seconds = Field(5.0, description="TCP (and TLS) connect to a backend")
    prefill: Seconds = Field(300.0, description="the prefill leg, and each leg to an encoder; engine's queue included")
    handoff: Seconds = Field(
        10.0,
        description="age at which a hand-off is no longer sent; nixl keeps it 30 s, then may answer with wrong text",
    )
    notice: Seconds = Field(
        10.0, description="from prefill's answer to its notification that the KV cache has arrived, for lmcache_pd"
    )
    first_token: Seconds = Field(300.0, description="from the decode leg's start to its first token, for streams")
    idle: Seconds = Field(120.0, description="silence of a stream that has begun, and of a client that stops reading")
    total: Seconds | None = Field(None, description="the whole request; off: a healthy long stream is never cut")
    request_headers: Seconds = Field(30.0, description="a client's request line and headers")
    request_body: Seconds = Field(60.0, description="a client's request body")


class Limits(Group):
    """Bytes, and connections."""

    connections: int | None = Field(
        None,
        ge=1,
        description="open connections of clients; more get a 503. Default and maximum: a third of ulimit -n",
    )
    connections_per_address: int | None = Field(
        None,
        ge=1,
        description="open connections of one address. None: no bound, since behind a proxy all have one address",
    )
    request_headers: int = Field(64 * 1024, ge=1024, description="request line and headers")
    request_body: int = Field(64 * 1024 * 1024, ge=1024, description="request body; enough for images and long prompts")
    bodies: int = Field(
        1024 * 1024 * 1024,
        ge=1024 * 1024,
        description="all request bodies in memory, each until its answer; more get a 503. Enough for 16 of the "
        "longest, or for 20,000 (admission.requests) of 50 kB",
    )
    transcript: int = Field(
        1024 * 1024,
        ge=1024,
        description="token ids kept for one stream so that it can be resumed; 5 to 6 bytes a token",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens that a request may ask for; more are a 400. None: the engine's bound",
    )
    default_max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of the answer to a request that sets no number. None: limits.max_tokens, if set",
    )
    answer: int = Field(256 * 1024 * 1024, ge=1024, description="an engine's answer that is not streamed")


class Routes(Group):
    """Optional routes."""

    docs: bool = Field(True, description="serve /docs, a page of all routes, and /openapi.json; both need no key")
    generate: bool = Field(
        False, description="serve /inference/v1/generate: tokens in, tokens out; engines need --enable-scale-out"
    )


class CorsSettings(Group):
    """Web pages of other origins that may use the gateway from a browser ([operating](operating.md#web-pages)). No page
    may use operators' routes and `/metrics`."""

    origins: Origins = Field(
        (), description="origins of these pages, as https://chat.example.com; * is any; none: no page may read answers"
    )
    credentials: bool = Field(
        False, description="pages may send cookies, for a login in front of the gateway; not with *"
    )
    max_age: int = Field(600, ge=0, description="seconds for which browsers may keep the answer to a preflight")

    @model_validator(mode="after")
    def _nobody_is_anybody(self) -> CorsSettings:
        if self.credentials and "*" in self.origins:
            raise ValueError("cors: credentials are not for every origin (*); name the origins")
        return self


class Health(Group):
    """Health checks of each backend, at the health path of its kind: whether it is up."""

    interval: Seconds = Field(2.0, description="seconds between probes of a backend that is up")
    timeout: Seconds = Field(2.0, description="seconds that one probe may take")
    failures: int = Field(2, ge=1, description="failed probes in a row after which a backend is down")
    longest_wait: Seconds = Field(5.0, description="most seconds between probes of a backend that is down")


class BreakerSettings(Group):
    """Ejects for a time a backend that is up but, by the outcomes of requests, does not work well. Like Envoy's outlier
    detection, with slowness as a third cause."""

    consecutive_failures: int = Field(5, ge=1, description="failed legs in a row that eject a backend")
    success_rate: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of successful legs in the window, relative to the pool's, below which it is ejected; 0: off",
    )
    slow_ratio: Annotated[float, Field(gt=1)] | None = Field(
        3.0, description="a backend this many times slower than its pool's median is ejected; needs three backends"
    )
    window: Seconds = Field(30.0, description="seconds for which a leg's outcome counts")
    minimum_volume: int = Field(10, ge=1, description="fewest legs for a decision by success rate or slowness")
    ejection: Seconds = Field(10.0, description="seconds of a first ejection; each further one lasts twice as long")
    longest_ejection: Seconds = Field(300.0, description="seconds of an ejection, at most")
    max_ejected: float = Field(
        0.5, ge=0, le=1, description="share of a pool that may be ejected; never the last; 0: off"
    )
    panic_threshold: float = Field(
        0.3, ge=0, le=1, description="share of a pool that must be fit; below it ejections are ignored"
    )
    slow_start: SecondsOrZero = Field(
        30.0, description="seconds in which a backend that returns gets its full load back"
    )


class Retries(Group):
    attempts: int = Field(
        4, ge=1, le=20, description="tries for a request's first token, and again for that of each resume"
    )
    resumes: int = Field(5, ge=0, le=100, description="times one broken stream may be continued on other backends")
    after_cut: int = Field(
        1,
        ge=0,
        le=20,
        description="further engines for a request after one died with it; few, or the request could kill all of them",
    )
    share: float = Field(0.2, ge=0, description="retries in progress, as a share of a pool's live requests, at most")
    floor: int = Field(
        10, ge=0, description="retries in progress that a pool may always have, however few its live requests"
    )


class AdmissionSettings(Group):
    """How many requests may run at once, and how the others wait ([operating](operating.md#overload)). Tokens are
    estimates: those of the prompt by its size, and `max_tokens`."""

    requests: int | None = Field(
        20_000,
        ge=1,
        description="requests that run at once in total; far above what one process relays, so it bounds memory",
    )
    tokens: int | None = Field(None, ge=1, description="tokens of the requests that run at once in total")
    prefill_requests: int | None = Field(None, ge=1, description="prefill legs at once on each prefill backend")
    prefill_tokens: int | None = Field(
        None, ge=1, description="prompt tokens at once on each prefill backend; a longer prompt goes to an idle one"
    )
    decode_requests: int | None = Field(
        None, ge=1, description="requests at once on each backend that answers clients, decode or mixed"
    )
    decode_tokens: int | None = Field(
        None, ge=1, description="tokens at once on each backend that answers clients: what its KV cache holds"
    )
    queue: int = Field(1000, ge=0, description="requests that may wait; 0 refuses instead")
    queue_bytes: int = Field(256 * 1024 * 1024, ge=1, description="bytes of the bodies of waiting requests")
    queue_timeout: Seconds = Field(30.0, description="seconds that a request may wait")
    slo: Literal["off", "refuse", "best_effort"] = Field(
        "off",
        description="a request that is expected to miss its targets.ttft is admitted all the same, or refused, or "
        "waits behind those of its client that can meet theirs",
    )


class ClientSettings(Group):
    """A client with a name."""

    name: str = Field(pattern=NAME, description="its name in metrics and logs; letters, digits, ._-")
    key: Secret = Field(description="the bearer token that it sends")
    weight: float = Field(
        1.0,
        ge=0.01,
        le=100,
        description="its share of free capacity, relative to other waiting clients of its priority",
    )
    priority: int = Field(0, ge=-100, le=100, description="higher goes first, always")
    requests: int | None = Field(
        None, ge=1, description="requests that it may have in the gateway at once, waiting ones included"
    )
    tokens: int | None = Field(None, ge=1, description="tokens of these requests")
    ttft: Seconds | None = Field(None, description="its own targets.ttft")
    tpot: Seconds | None = Field(None, description="its own targets.tpot")


Clients = Annotated[tuple[ClientSettings, ...], parsed_list('[{"name": "…", "key": "…"}]')]


class Shutdown(Group):
    """What SIGTERM does."""

    delay: SecondsOrZero = Field(
        0.0, description="seconds for which it serves with /ready at 503, so that load balancers see it"
    )
    grace: SecondsOrZero = Field(
        120.0, description="seconds for running requests to end; then their streams are closed"
    )


class MetricsSettings(Group):
    port: int | None = Field(None, ge=0, le=65535, description="serve /metrics on this port instead of the main one")
    old_names: bool = Field(True, description="show the metrics that 0.4.0 renamed under their old names too")
