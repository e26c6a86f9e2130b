"""One frozen settings tree, validated once.

A setting has one name everywhere: `timeouts.prefill` in the file, `PD_PROXY_TIMEOUTS__PREFILL` in the environment,
`--timeouts.prefill` as a flag. Flags win over the environment, the environment over the file. Unknown keys are refused
in all three, since a misspelt setting that is silently ignored is found in production.

A secret may be a reference instead, so that it stands in no process list and in no file of settings: `file:PATH` or
`env:VARIABLE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from pd_proxy.decoding import decode_json_once
from pd_proxy.settings.environment import read_variables

_LONGEST = 366 * 86400.0  # seconds; far beyond it event loops refuse to wait
Seconds = Annotated[float, Field(gt=0, le=_LONGEST)]
SecondsOrZero = Annotated[float, Field(ge=0, le=_LONGEST)]
KindName = Literal["vllm", "sglang", "tensorrt_llm", "nim", "openai"]
ConnectorName = Literal[
    "nixl",
    "mooncake_ascend",
    "mooncake",
    "ascend_layerwise",
    "lmcache_pd",
    "moriio_read",
    "moriio_write",
    "p2p_nccl",
    "sglang",
    "tensorrt_llm",
    "nixl_push",
    "offload_p2p",
    "shared_cache",
]
ConnectorChoice = Literal[ConnectorName, "auto"]
SENDS_NOTICES = {"lmcache_pd"}
"""The connectors whose prefill engines say at `zmq.notices` that a KV cache has arrived."""
REGISTER = {"moriio_read", "moriio_write", "p2p_nccl"}
"""The connectors whose engines say at `zmq.registrations` where they are reached."""
PolicyName = Literal["auto", "least_loaded", "prefix", "session", "round_robin", "random", "power_of_two"]


class Misfit(ValueError):
    """A value that is good by itself does not go with another one.

    Attributes:
        settings: the dotted names of the two, with the number of an item where it is a list; the first that somebody
            has set is where it is to be mended.
    """

    def __init__(self, setting: str, text: str, *others: str) -> None:
        super().__init__(text)
        self.settings = (setting, *others)


_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:/|https?([:/]|$)", re.IGNORECASE)
_ROUTE = re.compile(r"/(v\d+/(chat/)?(completions|models|messages|responses|embeddings)|health|metrics|ping|generate)")


def backend_url(value: str) -> str:
    """A backend's URL in its one form: scheme and host in lower case, explicit port kept, no trailing slash."""
    text = value.strip()
    shown = repr(value.rpartition("@")[2].partition("?")[0])  # what stands before or behind may be a secret
    if "://" not in text:
        if _SCHEME.match(text):
            raise ValueError(f"{shown}: two slashes stand behind the scheme and its colon, as in http://host:port")
        text = f"http://{text}"
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{shown}: a backend's URL is plain ASCII without spaces (an international host in punycode)")
    parts = urlsplit(text)
    if parts.scheme.lower() not in ("http", "https"):
        raise ValueError(f"{shown}: a backend is http://host:port or https://host:port")
    if not parts.hostname:
        raise ValueError(f"{shown} names no host")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"{parts.hostname}: the port must be a number from 1 to 65535")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{parts.hostname}: credentials do not belong in a backend's URL; set backend_api_key")
    if parts.query or parts.fragment:
        raise ValueError(f"{shown}: a backend's URL has no query and no fragment")
    if parts.netloc.endswith(":"):
        raise ValueError(f"{parts.hostname}: a colon without a port")
    _check_host(parts.hostname, bracketed="[" in parts.netloc)
    path = parts.path.rstrip("/").removesuffix("/v1")  # a base_url pasted from a client's settings
    if _ROUTE.fullmatch(path):
        raise ValueError(f"{shown}: {path} is one of an engine's routes; a backend's URL ends before it")
    if "//" in parts.path.rstrip("/") + "/":
        raise ValueError(f"{shown}: there is an empty part in its path")
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}{path}"


def _check_host(host: str, *, bracketed: bool = False) -> None:
    """Raise unless it is a name or an address."""
    if bracketed or re.fullmatch(r"[0-9.]+", host):
        try:
            ip_address(host.partition("%")[0])
        except ValueError:
            raise ValueError(f"{host} is no IP address") from None
    elif not _HOST.fullmatch(host) or ".." in host:
        raise ValueError(f"{host!r} is no name of a host")


def _split(value: object) -> object:
    """Lists may come as one string (environment, flags): comma-separated."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _parsed(shape: str) -> BeforeValidator:
    """Lists of groups may come as one string (environment, flags): JSON, of the given shape."""

    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return decode_json_once(value)
        except ValueError:  # said without the text, since there are keys in it
            raise ValueError(f"as a variable or a flag this is a JSON list: {shape}") from None

    return BeforeValidator(parse)


def _network(value: object) -> IPv4Network | IPv6Network:
    return ip_network(str(value).strip())


Networks = Annotated[
    tuple[Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)], ...], BeforeValidator(_split)
]
BackendUrls = Annotated[tuple[Annotated[str, AfterValidator(backend_url)], ...], BeforeValidator(_split)]
_IN_FILE = "file:"
_IN_VARIABLE = "env:"
REFERENCES = (_IN_FILE, _IN_VARIABLE)
"""How a secret begins that is not given itself, but by where it is."""
_PLACEHOLDER = re.compile(r"\$\{\w+[^}]*\}|\$\(\w+\)|\$[A-Z][A-Z0-9_]*|\{\{.*\}\}|<[\w -]+>")


def _secrets(value: object) -> object:
    """Several secrets: a list, or one string with commas. A file may hold several, one a line."""
    items = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    found: list[object] = []
    for item in items:
        if isinstance(item, str) and item.startswith(_IN_FILE):
            found += [line.strip() for line in _referred(item).splitlines() if line.strip()]
        else:
            found.append(item)
    return found


def _secret(value: object) -> object:
    """A secret, from where it is if it was not given itself. None without characters: that one everybody has."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if not isinstance(value, str):
        return value
    value = _referred(value)
    if not value.strip():
        raise ValueError("an empty secret is none; for none leave the setting out")
    if _PLACEHOLDER.fullmatch(value):
        raise ValueError("this is a placeholder that nobody has replaced; a secret may also be file:PATH or env:NAME")
    if value != value.strip() or not value.isascii() or not value.isprintable():
        raise ValueError("a secret is printable ASCII without spaces around it, since it is sent in a header")
    return value


def _referred(value: str) -> str:
    """What `file:PATH` or `env:VARIABLE` names; else the value itself."""
    text = value
    if value.startswith(_IN_VARIABLE):
        where = value.removeprefix(_IN_VARIABLE)
        text = _environment.get().get(where, "")
        where = f"the variable {where}"
    elif value.startswith(_IN_FILE):
        where = value.removeprefix(_IN_FILE)
        try:
            text = Path(where).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}") from None
        except ValueError:  # a null byte in the path, or bytes that are no text
            raise ValueError(f"{where}: it is not UTF-8 text") from None
    if text is not value and not text.strip():
        raise ValueError(f"{where} is empty or not there")
    return text


Secret = Annotated[SecretStr, BeforeValidator(_secret)]
Secrets = Annotated[tuple[Secret, ...], BeforeValidator(_secrets)]


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words that a setting may have, where these are all."""
    parts = get_args(annotation)
    return parts if parts and all(isinstance(part, str) for part in parts) else ()


def _is_number(annotation: Any) -> bool:
    parts = get_args(annotation)
    return annotation in (int, float) or bool(_choices(annotation) == () and any(map(_is_number, parts)))


class Group(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: object, info: ValidationInfo) -> object:
        """Words in any case, with hyphens or underscores; `off`, which YAML takes for false. No number is a yes."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool):
            if _is_number(annotation):
                raise ValueError(f"must be a number, not {str(value).lower()}")
            word = "on" if value else "off"
            return word if word in _choices(annotation) else value
        if isinstance(value, str) and (choices := _choices(annotation)):
            word = value.strip().lower().replace("-", "_")
            return word if word in choices else value
        if value is None and isinstance(annotation, type) and issubclass(annotation, Group):
            return {}  # a group whose members are all commented out
        return value


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
DEFAULT_GROUP = "default"
"""The name of the group that the top level's backends make up."""

Ports = Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], BeforeValidator(_split)]


def _publisher(value: str) -> str:
    """A ZeroMQ endpoint of each engine: `tcp://{host}:5557`, where `{host}` stands for the host of the engine's URL."""
    text = value.strip()
    if not text:
        return ""
    try:
        parts = urlsplit(text.replace("{host}", "host"))
        good = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
        good = good and not (parts.path or parts.query or parts.fragment or parts.username)
    except ValueError:
        good = False
    if not good or "*" in text:
        raise ValueError(f"{value!r}: this is tcp://{{host}}:PORT, where {{host}} stands for each engine's own")
    return text


PublisherEndpoint = Annotated[str, AfterValidator(_publisher)]


class KvEventsSettings(Group):
    """What engines say of their prefix caches over ZeroMQ ([KV events](kv-events.md)), as vLLM's and SGLang's
    `--kv-events-config` has them do. It corrects what the gateway believes that they have cached."""

    endpoint: PublisherEndpoint = Field(
        "",
        description="where each engine publishes, as `tcp://{host}:5557`, `{host}` being its URL's; data-parallel rank "
        "n publishes n ports further on; empty: off",
    )
    replay: PublisherEndpoint = Field(
        "", description="where missed events are asked for (`replay_endpoint`), likewise; empty: they stay missed"
    )
    topic: str = Field("", max_length=256, description="the topic that they publish with; empty: any")

    @model_validator(mode="after")
    def _replays_what_is_heard(self) -> KvEventsSettings:
        if self.replay and not self.endpoint:
            raise ValueError("kv_events: replay without an endpoint; set where the engines publish")
        if self.replay and self.replay == self.endpoint:
            raise ValueError("kv_events: replay is an endpoint of its own (replay_endpoint of --kv-events-config)")
        return self


class BackendGroup(Group):
    """Backends that hand over to each other, beside those of the top level: a second fleet of prefill and decode nodes,
    with another model, or of another make."""

    name: str = Field(pattern=_NAME, description="what logs and /admin call it; letters, digits, ._-")
    kind: KindName = Field("vllm", description="what its backends are")
    connector: ConnectorChoice = Field(
        "nixl", description="the hand-off protocol its engines speak; auto: the one that they tell of"
    )
    prefill: BackendUrls = Field((), description="URLs of its prefill backends")
    decode: BackendUrls = Field((), description="URLs of its decode backends")
    mixed: BackendUrls = Field((), description="URLs of its backends that do both")
    encode: BackendUrls = Field((), description="URLs of its encoders of images, audio and video")
    kv_events: KvEventsSettings = Field(
        KvEventsSettings(), description="where its engines publish KV events: endpoint, replay and topic; none: off"
    )


class Location(Group):
    """Where a backend's side of the hand-off is reached, for connectors that need to know. What an engine tells by
    itself need not be here."""

    backend: Annotated[str, AfterValidator(backend_url)] = Field(description="the backend's URL, as in its pool")
    host: str = Field("", description="as its peers reach it; empty: its URL's host")
    port: int = Field(
        0, ge=0, le=65535, description="of its bootstrap server, side channel or handshake; 0: the connector's default"
    )
    notify_port: int = Field(0, ge=0, le=65535, description="where it hears of transfers, for connectors that have one")
    init_ports: Ports = Field((), description="of a receiver that is written to: one for each tensor-parallel rank")
    alloc_ports: Ports = Field((), description="likewise, for its memory")
    query_ports: Ports = Field((), description="likewise, for what it has")
    engine_ids: Annotated[tuple[str, ...], BeforeValidator(_split)] = Field(
        (), description="its connector's engine id, one for each data-parallel rank"
    )
    kv_events_port: int = Field(
        0, ge=0, le=65535, description="where it publishes KV events; 0: the port of its group's kv_events.endpoint"
    )
    kv_replay_port: int = Field(
        0, ge=0, le=65535, description="where missed ones are asked for; 0: the port of its group's kv_events.replay"
    )
    tp: int = Field(1, ge=1, description="tensor-parallel ranks")
    pp: int = Field(1, ge=1, description="pipeline ranks")
    dp: int = Field(
        1,
        ge=1,
        description="data-parallel ranks behind its URL; with several, each leg is sent to the least loaded, or where "
        "`auto` or `prefix` places prompts to the one that will have computed the prompt first",
    )


def _mapped(value: object) -> object:
    """Mappings may come as one string (environment, flags): `name=model`, comma-separated."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(sign for _, sign, _ in pairs):
        raise ValueError("as a variable or a flag this is a list of name=model, separated by commas")
    return {name.strip(): model.strip() for name, _, model in pairs}


ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Aliases = Annotated[dict[ModelName, ModelName], BeforeValidator(_mapped)]
Groups = Annotated[tuple[BackendGroup, ...], _parsed('[{"name": "…", "prefill": ["…"], "decode": ["…"]}]')]
Locations = Annotated[tuple[Location, ...], _parsed('[{"backend": "…", "port": …}]')]


class Policies(Group):
    """How a backend is chosen within each pool."""

    prefill: PolicyName = Field("auto", description="policy of the prefill pool")
    decode: PolicyName = Field("auto", description="policy of the decode pool")
    mixed: PolicyName = Field("auto", description="policy of the mixed pool")
    session_header: str = Field(
        "x-session-id",
        pattern=r"^[a-z0-9_.-]{1,64}$",
        description="header that names a request's session, for the policy session; without it its body's own names do",
    )

    @field_validator("session_header", mode="before")
    @classmethod
    def _in_any_case(cls, name: object) -> object:
        return name.lower() if isinstance(name, str) else name


class Targets(Group):
    """What clients are to get ([operating](operating.md#targets)). They guide where requests go; with `admission.slo`
    they also decide who is let in. A client of `clients` may have its own."""

    ttft: Seconds | None = Field(None, description="seconds in which a request is to have its first token")
    tpot: Seconds | None = Field(None, description="seconds that each further token is to take, on average")


class Timeouts(Group):
    """Seconds. Each watches one thing, so that none of them cuts what is healthy."""

    connect: Seconds = Field(5.0, description="TCP (and TLS) connect to a backend")
    prefill: Seconds = Field(300.0, description="the prefill leg, and each leg to an encoder; engine's queue included")
    handoff: Seconds = Field(
        10.0, description="age at which a hand-off is no longer sent; engines keep it 30 s, then answer with wrong text"
    )
    notice: Seconds = Field(
        10.0, description="from prefill's answer to its notice that the KV cache has arrived, for connectors with one"
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
        description="open connections of clients; more get a 503. None, and at most: a third of the files it may open",
    )
    connections_per_address: int | None = Field(
        None, ge=1, description="of these, how many one address may have; None: any, as behind a proxy all are one"
    )
    request_headers: int = Field(64 * 1024, ge=1024, description="request line and headers")
    request_body: int = Field(64 * 1024 * 1024, ge=1024, description="request body: room for images and long prompts")
    bodies: int = Field(
        1024 * 1024 * 1024,
        ge=1024 * 1024,
        description="request bodies held at a time, until answered; more get a 503: room for 16 of the longest, or for "
        "20,000 (admission.requests) of 50 kB",
    )
    transcript: int = Field(
        1024 * 1024, ge=1024, description="token ids kept of one stream so that it can be resumed; 5 to 6 bytes a token"
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens that a request may ask for as its answer; more are a 400. None: the engine's bound",
    )
    default_max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of the answer to a request that names no number. None: limits.max_tokens, if set",
    )
    answer: int = Field(256 * 1024 * 1024, ge=1024, description="an engine's answer that is not streamed")


class Routes(Group):
    """Routes that are not for everybody."""

    docs: bool = Field(True, description="serve /docs, a page of every route, and /openapi.json; both need no key")
    generate: bool = Field(
        False, description="serve /inference/v1/generate: tokens in, tokens out; engines need --enable-scale-out"
    )


def _origin(value: str) -> str:
    """An origin in the form in which browsers send it."""
    text = value.strip().lower()
    if text == "*":
        return text
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://([a-z0-9._~%-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", text):
        raise ValueError(f"{value[:128]!r}: an origin is scheme://host or scheme://host:port, without a path; or *")
    for scheme, port in (("http", ":80"), ("https", ":443")):
        if text.startswith(f"{scheme}://"):
            text = text.removesuffix(port)
    return text


Origins = Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], BeforeValidator(_split)]


class CorsSettings(Group):
    """Which web pages of other origins may use the gateway from a browser ([operating](operating.md#web-pages)). The
    routes of operators and `/metrics` are for no page."""

    origins: Origins = Field(
        (), description="origins whose pages may, as https://chat.example.com; * is any; none: no page may read answers"
    )
    credentials: bool = Field(
        False, description="pages may send cookies and the like, for what stands in front of the gateway; not with *"
    )
    max_age: int = Field(600, ge=0, description="seconds for which browsers may remember what they may ask")

    @model_validator(mode="after")
    def _nobody_is_anybody(self) -> CorsSettings:
        if self.credentials and "*" in self.origins:
            raise ValueError("cors: credentials are not for every origin (*); name the origins")
        return self


class Health(Group):
    """Active probes of each backend, at the health path of its kind: is it alive?"""

    interval: Seconds = Field(2.0, description="seconds between probes of a backend that is up")
    timeout: Seconds = Field(2.0, description="seconds one probe may take")
    failures: int = Field(2, ge=1, description="failed probes in a row that take a backend out")
    longest_wait: Seconds = Field(5.0, description="most seconds between probes of a backend that is down")


class BreakerSettings(Group):
    """What real requests tell: is a backend that is alive any good? Where not, it is ejected for a time. As Envoy's
    outlier detection, with slowness as a third cause."""

    consecutive_failures: int = Field(5, ge=1, description="failed legs in a row that eject a backend")
    success_rate: float = Field(
        0.8,
        ge=0,
        le=1,
        description="share of good legs in the window, relative to the pool's, that keeps it in; 0: off",
    )
    slow_ratio: Annotated[float, Field(gt=1)] | None = Field(
        3.0, description="a backend so many times slower than its pool's median is ejected; needs three backends"
    )
    window: Seconds = Field(30.0, description="seconds for which a leg's outcome counts")
    minimum_volume: int = Field(10, ge=1, description="legs that a judgement of success rate or slowness needs")
    ejection: Seconds = Field(10.0, description="seconds of a first ejection; each further one lasts twice as long")
    longest_ejection: Seconds = Field(300.0, description="seconds of an ejection, at most")
    max_ejected: float = Field(
        0.5, ge=0, le=1, description="share of a pool that may be ejected; never the last; 0: off"
    )
    panic_threshold: float = Field(
        0.3, ge=0, le=1, description="share of a pool that must be fit, lest ejections be ignored"
    )
    slow_start: SecondsOrZero = Field(
        30.0, description="seconds in which a backend that returns gets its full load back"
    )


class Retries(Group):
    attempts: int = Field(4, ge=1, le=20, description="tries for a request's first token, and again for each resume's")
    resumes: int = Field(5, ge=0, le=100, description="times one broken stream may be continued on other backends")
    after_cut: int = Field(
        1,
        ge=0,
        le=20,
        description="engines that a request is given after one ended while it had it; 1, lest it ends them all",
    )
    share: float = Field(0.2, ge=0, description="retries in progress, as a share of a pool's live requests, at most")
    floor: int = Field(10, ge=0, description="retries in progress that a pool may have however few its live requests")


class AdmissionSettings(Group):
    """What may run at once, and who waits for it ([operating](operating.md#overload)). Tokens are estimates: those of
    the prompt by its size, and `max_tokens`."""

    requests: int | None = Field(
        20_000,
        ge=1,
        description="requests that run at once in all; far above what one process relays, so bounds memory",
    )
    tokens: int | None = Field(None, ge=1, description="tokens of the requests that run at once in all")
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
    queue_bytes: int = Field(256 * 1024 * 1024, ge=1, description="bytes of the bodies of those that wait")
    queue_timeout: Seconds = Field(30.0, description="seconds a request may wait")
    slo: Literal["off", "refuse", "best_effort"] = Field(
        "off",
        description="a request that is expected to miss its targets.ttft is let in all the same, or refused, or goes "
        "behind those of its client's that can meet theirs",
    )


class ClientSettings(Group):
    """A client with a name."""

    name: str = Field(pattern=_NAME, description="what metrics and logs call it; letters, digits, ._-")
    key: Secret = Field(description="what it sends as a bearer token")
    weight: float = Field(
        1.0, ge=0.01, le=100, description="its share of what is free, beside others of its priority that wait too"
    )
    priority: int = Field(0, ge=-100, le=100, description="higher goes first, always")
    requests: int | None = Field(None, ge=1, description="requests it may have here at once, waiting ones included")
    tokens: int | None = Field(None, ge=1, description="tokens of these")
    ttft: Seconds | None = Field(None, description="its own targets.ttft")
    tpot: Seconds | None = Field(None, description="its own targets.tpot")


Clients = Annotated[tuple[ClientSettings, ...], _parsed('[{"name": "…", "key": "…"}]')]


class Shutdown(Group):
    """What SIGTERM does."""

    delay: SecondsOrZero = Field(
        0.0, description="seconds to serve on with /ready at 503, so that load balancers see it"
    )
    grace: SecondsOrZero = Field(
        120.0, description="seconds for running requests to end; then their streams are closed"
    )


def _socket_address(value: str) -> str:
    """`host:port` of a socket to bind; a host is an IP address, IPv6 in brackets."""
    text = value.strip().removeprefix("tcp://")
    if not text:
        return ""
    try:
        parts = urlsplit(f"//{text}")
        ip_address(parts.hostname or "")
        good = bool(parts.port) and not (parts.path or parts.query or parts.fragment or parts.username)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"{value!r}: this is an IP address of this machine and a port, as 10.0.0.9:7500")
    return text


SocketAddress = Annotated[str, AfterValidator(_socket_address)]


def _socket_path(value: str) -> str:
    """A path at which a unix socket can be made. The kernel's limit is 107 bytes, and while the socket is made its name
    is longer by a process id."""
    text = value.strip()
    if len(os.fsencode(text)) > 95 or "\0" in text:
        raise ValueError(f"{value[:128]!r}: the path of a unix socket has at most 95 bytes")
    return text


SocketPath = Annotated[str, AfterValidator(_socket_path)]


class ZmqSettings(Group):
    """Sockets at which engines tell the gateway something over ZeroMQ. Nobody is authenticated there: bind them to an
    internal address ([connectors](connectors.md#zeromq))."""

    notices: SocketAddress = Field(
        "", description="address to hear of KV caches that have arrived: `pd_proxy_host` and `pd_proxy_port` of LMCache"
    )
    registrations: SocketAddress = Field(
        "", description="address to hear where engines are reached: `proxy_ip` and `proxy_ping_port` or `proxy_port`"
    )
    expiry: Seconds = Field(
        10.0, description="seconds without a registration, sent every 3 s, after which an engine is out of the rotation"
    )
    networks: Networks = Field(
        (), description="where engines may be that join by registering; none: only configured backends register"
    )
    group: str = Field(DEFAULT_GROUP, description="the group that engines join by registering")


class MetricsSettings(Group):
    port: int | None = Field(None, ge=0, le=65535, description="serve /metrics on this port instead of the main one")
    old_names: bool = Field(True, description="show the metrics that 0.4.0 renamed under their old names too")


CALLED_BACK = frozenset({"ascend_layerwise"})
"""The connectors whose decode engines call the gateway back (`metaserver`)."""


def _own_url(value: str) -> str:
    url = backend_url(value)
    host = urlsplit(url).hostname or ""
    if host == "0.0.0.0" or host == "::":  # noqa: S104 - refused
        raise ValueError(f"{host} is no address that an engine could call; name one of this host's own")
    return url


class Metaserver(Group):
    """Where decode engines call the gateway back, for connectors by which they do
    ([connectors](connectors.md#ascend_layerwise))."""

    url: Annotated[str, AfterValidator(_own_url)] | None = Field(
        None, description="this gateway as engines reach it (http://host:port); they call /v1/metaserver there"
    )
    allow: Networks = Field((), description="networks from which engines may call; none named: any address")


def _log_level(value: object) -> object:
    """Other programs' words for a level as well: `warn`, `critical`, `fatal`."""
    others = {"warn": "warning", "critical": "error", "fatal": "error"}
    return others.get(value.strip().lower(), value) if isinstance(value, str) else value


LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_log_level)]


def _listening_host(value: str) -> str:
    text = value.strip()
    if text == "*":
        raise ValueError("all addresses are 0.0.0.0, or :: for IPv6")
    if "://" in text or "/" in text or re.fullmatch(r"[^:]*:\d*|\[.*\]:\d*", text):
        raise ValueError(f"{value!r}: a host alone, without scheme and port")
    host = text.removeprefix("[").removesuffix("]")
    if not host:
        raise ValueError("must not be empty; all addresses are 0.0.0.0")
    _check_host(host, bracketed=":" in host)
    return host


def _with_port(url: str) -> str:
    """A backend's URL with its port, also where that is the scheme's own: `http://a` is `http://a:80`."""
    parts = urlsplit(url)
    return url if parts.port else urlunsplit(parts._replace(netloc=f"{parts.netloc}:{_PORTS[parts.scheme]}"))


_PORTS = {"http": 80, "https": 443}


def _overlap(one: str, other: str) -> bool:
    """Whether one port cannot be bound at both addresses."""
    return one == other or not {"0.0.0.0", "::"}.isdisjoint((one, other))  # noqa: S104 - compared


class Settings(Group, BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(validate_default=False)

    host: Annotated[str, AfterValidator(_listening_host)] = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 for all, as in a container"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    reuse_port: bool = Field(
        False, description="let a new gateway of the same user listen beside this one, to take over from it"
    )
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve together; one relays some ten thousand tokens/s"
    )
    prefill: BackendUrls = Field((), description="a prefill backend's URL; may be repeated")
    decode: BackendUrls = Field((), description="a decode backend's URL; may be repeated")
    mixed: BackendUrls = Field((), description="URL of a backend that does both; may be repeated")
    kind: KindName = Field(
        "vllm", description="what the backends are: where they say how they are, and which routes they offer"
    )
    encode: BackendUrls = Field(
        (), description="URL of an encoder of images, audio and video, whose output the others take; may be repeated"
    )
    connector: ConnectorChoice = Field(
        "nixl", description="the hand-off protocol the engines speak; auto: the one that they tell of"
    )
    groups: Groups = Field(
        (), description="further fleets of backends, each with a connector of its own; no hand-off leaves its group"
    )
    locations: Locations = Field(
        (), description="where backends' sides of the hand-off are reached, for connectors that need to know"
    )
    aliases: Aliases = Field(
        {}, description="names by which clients may ask for a model: its alias, and the engines' own name for it"
    )
    default_model: str = Field("", description="the model of requests that name none; empty: the engines' own")
    unknown_model: Literal["reject", "default"] = Field(
        "reject", description="a request for a model that no engine has: it is a 404, or default_model serves it"
    )
    pair_revisions: Literal["strict", "any"] = Field(
        "strict", description="pair only engines of one version and one model root, as far as they tell, or any"
    )
    fallback: Literal["local_prefill", "reject"] = Field(
        "local_prefill", description="when there is no hand-off: decode prefills for itself, or it is an error"
    )
    resume: Literal["exact", "best_effort", "off"] = Field(
        "exact",
        description="a stream whose backend dies is continued: only where that is exact, wherever it can be, never",
    )
    first_token: Literal["auto", "prefill", "decode"] = Field(
        "auto",
        description="who gives a client its first token: prefill where it is exact, wherever it is safe, always decode",
    )
    reuse_tokens: bool = Field(
        True, description="decode takes the prompt's token ids from prefill instead of tokenising again, where it can"
    )
    policy: Policies = Policies()
    targets: Targets = Targets()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    routes: Routes = Routes()
    cors: CorsSettings = CorsSettings()
    health: Health = Health()
    breaker: BreakerSettings = BreakerSettings()
    retries: Retries = Retries()
    warmup: bool = Field(
        True, description="send a tiny request through each new pair, so that no user pays the handshake"
    )
    ready_by_fallback: bool = Field(
        False,
        description="/ready is 200 though no pair has ever handed over, as long as decode serves alone (fallback); it "
        "is 503 otherwise, where warmup tries pairs",
    )
    admission: AdmissionSettings = AdmissionSettings()
    shutdown: Shutdown = Shutdown()
    metrics: MetricsSettings = MetricsSettings()
    metaserver: Metaserver = Metaserver()
    zmq: ZmqSettings = ZmqSettings()
    kv_events: KvEventsSettings = KvEventsSettings()
    tokenizer: str = Field(
        "",
        description="path of the model's `tokenizer.json`, by which KV events are told apart for prompts of text; "
        "needs the extra `tokenizers` ([KV events](kv-events.md#prompts-of-text))",
    )
    api_keys: Secrets = Field((), description="keys clients must send as a bearer token; none: open")
    clients: Clients = Field(
        (), description="clients with names, keys, and bounds and shares of their own, beside api_keys"
    )
    admin_key: Secret | None = Field(
        None,
        description="key for what operators do (/admin, /instances, /reset_prefix_cache, the profiler); none: this "
        "machine's own programs may look, and nobody may change anything but at admin_socket",
    )
    admin_socket: SocketPath = Field(
        "", description="path of a unix socket, for the gateway's own user, at which operators need no key; empty: none"
    )
    backend_api_key: Secret | None = Field(None, description="bearer token the gateway sends to the backends")
    handoff_key: Secret | None = Field(
        None, description="key shared with TensorRT-LLM's generation servers, with which hand-offs to them are signed"
    )
    log_level: LogLevel = Field("info", description="what is logged")
    log_format: Literal["text", "json"] = Field("text", description="shape of a log line")
    access_log: bool = Field(False, description="log a line for every request, not only for failed ones")
    throughput_interval: SecondsOrZero = Field(
        60.0, description="seconds between lines of the log that say how much is served, while anything is; 0: none"
    )

    @model_validator(mode="after")
    def _roles_differ(self) -> Settings:
        seen: dict[str, str] = {}
        names = [group.name for group in self.all_groups()]
        if len(names) != len(set(names)):
            raise Misfit("groups", f"groups: each has a name of its own, and none is {DEFAULT_GROUP}")
        for position, group in enumerate(self.all_groups(), -1):
            for role in ("prefill", "decode", "mixed", "encode"):
                place = role if group.name == DEFAULT_GROUP else f"{role} of group {group.name}"
                for item, url in enumerate(getattr(group, role)):
                    backend = _with_port(url)
                    if other := seen.get(backend):
                        where = f"twice under {place}" if other == place else f"under {other} and under {place}"
                        setting = f"{role}.{item}" if position < 0 else f"groups.{position}.{role}.{item}"
                        raise Misfit(setting, f"{url} is listed {where}; a backend has one role (use mixed for both)")
                    seen[backend] = place
        for item, location in enumerate(self.locations):
            if _with_port(location.backend) not in seen:
                raise Misfit(
                    f"locations.{item}.backend", f"locations: {location.backend} is no backend of this gateway"
                )
        if len({location.backend for location in self.locations}) != len(self.locations):
            raise Misfit("locations", "locations: a backend is listed twice")
        return self

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> Settings:
        for alias, model in self.aliases.items():
            if model in self.aliases:
                raise Misfit(
                    f"aliases.{alias}", f"aliases: {alias} stands for {model}, which is an alias itself; name the model"
                )
        if self.unknown_model == "default" and not self.default_model:
            raise Misfit("unknown_model", "unknown_model: default needs a default_model")
        return self

    @model_validator(mode="after")
    def _engines_are_heard(self) -> Settings:
        if self.zmq.group not in {group.name for group in self.all_groups()}:
            raise Misfit("zmq.group", f"zmq.group: there is no group {self.zmq.group}")
        located = {location.backend: location for location in self.locations}
        for group in self.all_groups():
            at = "connector" if group.name == DEFAULT_GROUP else "groups"
            joined = bool(self.zmq.networks) and group.name == self.zmq.group
            if joined and group.connector not in REGISTER:
                raise Misfit(
                    "zmq.networks", f"zmq.networks: engines of {group.connector} (group {group.name}) do not register"
                )
            if group.connector not in SENDS_NOTICES | REGISTER or not (group.prefill or group.decode or joined):
                continue
            if self.reuse_port or self.workers > 1:
                other = "reuse_port" if self.reuse_port else "several workers"
                raise Misfit(
                    "reuse_port" if self.reuse_port else "workers",
                    f"{group.connector}: not with {other}, since engines tell one process only",
                )
            if group.connector in REGISTER:
                if not self.zmq.registrations:
                    raise Misfit(at, f"{group.connector}: zmq.registrations must be set, where its engines register")
                continue
            if not self.zmq.notices:
                raise Misfit(at, f"{group.connector}: zmq.notices must be set, where its prefill says that it is done")
            for url in group.decode:
                location = located.get(url) or Location.model_construct(backend=url)
                if not location.init_ports or len(location.alloc_ports) != len(location.init_ports):
                    raise Misfit(
                        "decode" if at == "connector" else at,
                        f"{group.connector}: {url} needs init_ports and as many alloc_ports in locations, "
                        "one for each of its tensor-parallel ranks",
                    )
                if location.query_ports and len(location.query_ports) != len(location.init_ports):
                    raise Misfit(
                        "locations",
                        f"{group.connector}: {url} has fewer or more query_ports than init_ports in locations",
                    )
        return self

    @model_validator(mode="after")
    def _go_together(self) -> Settings:
        if self.port and self.metrics.port == self.port:
            raise Misfit("metrics.port", f"metrics.port: {self.port} is taken by port; leave it out for /metrics there")
        bound = [("port", self.host, self.port), ("metrics.port", self.host, self.metrics.port)]
        for name, address in (("zmq.notices", self.zmq.notices), ("zmq.registrations", self.zmq.registrations)):
            parts = urlsplit(f"//{address}")
            for other, host, port in bound:
                if port and port == parts.port and _overlap(host, parts.hostname or ""):
                    raise Misfit(name, f"{name}: {port} is taken by {other}", other)
            bound.append((name, parts.hostname or "", parts.port))
        if self.breaker.ejection > self.breaker.longest_ejection:
            raise Misfit(
                "breaker.ejection", "breaker.ejection: it is above breaker.longest_ejection", "breaker.longest_ejection"
            )
        for position, group in enumerate(self.all_groups(), -1):
            if group.kind == "openai" and group.prefill and group.decode:
                raise Misfit(
                    "kind" if position < 0 else f"groups.{position}.kind",
                    "kind: backends of kind openai hand nothing over; list them under mixed, or say what they are",
                )
        return self

    def all_groups(self) -> list[BackendGroup]:
        """Every group of backends, the top level's first."""
        own = BackendGroup.model_construct(
            name=DEFAULT_GROUP,
            kind=self.kind,
            connector=self.connector,
            prefill=self.prefill,
            decode=self.decode,
            mixed=self.mixed,
            encode=self.encode,
            kv_events=self.kv_events,
        )
        return [own, *self.groups]

    @model_validator(mode="after")
    def _can_be_called_back(self) -> Settings:
        used = CALLED_BACK.intersection(group.connector for group in self.all_groups())
        if used and self.metaserver.url is None:
            raise Misfit(
                "connector" if self.connector in used else "groups",
                f"metaserver.url: decode engines that speak {', '.join(sorted(used))} call the gateway back; set the "
                "URL at which they reach this one",
            )
        return self

    @model_validator(mode="after")
    def _targets_can_be_met(self) -> Settings:
        owners: list[tuple[str, Targets | ClientSettings]] = [
            ("targets", self.targets),
            *((f"clients.{n}", client) for n, client in enumerate(self.clients)),
        ]
        limits = {
            "ttft": {"timeouts.total": self.timeouts.total, "timeouts.prefill": self.timeouts.prefill},
            "tpot": {"timeouts.total": self.timeouts.total, "timeouts.idle": self.timeouts.idle},
        }
        for owner, targets in owners:
            for name, bounds in limits.items():
                target = getattr(targets, name)
                for bound, seconds in bounds.items():
                    if target is not None and seconds is not None and target > seconds:
                        at = f"{owner}.{name}"
                        raise Misfit(at, f"{at}: {bound} ends a request after {seconds:g} s, before its target", bound)
        if self.admission.slo != "off" and all(targets.ttft is None for _, targets in owners):
            raise Misfit("admission.slo", f"admission.slo: {self.admission.slo} needs targets.ttft, or a client's own")
        return self

    @model_validator(mode="after")
    def _clients_differ(self) -> Settings:
        names, keys = set[str](), dict[str, str]()
        for place, (name, secret) in enumerate(self.client_keys()):
            other = keys.setdefault(secret.get_secret_value(), name)
            if name in names:
                raise Misfit("clients", f"clients: two of them are named {name}")
            if other != name and place >= len(self.api_keys):  # the same key twice in api_keys harms nobody
                raise Misfit("clients", f"clients: {other} and {name} have the same key")
            names.add(name)
        return self

    def share(self, workers: int) -> Settings:
        """The settings of one of several workers: its share of what the gateway may have in all. Bounds of backends
        stay whole, since the workers know of each other's load."""

        def part(bound: int | None) -> int | None:
            return bound if bound is None else -(-bound // workers)

        bounds = {name: part(getattr(self.admission, name)) for name in ("requests", "tokens", "queue", "queue_bytes")}
        clients = tuple(
            client.model_copy(update={"requests": part(client.requests), "tokens": part(client.tokens)})
            for client in self.clients
        )
        retries = self.retries.model_copy(update={"floor": part(self.retries.floor)})
        limits = self.limits.model_copy(
            update={"connections": part(self.limits.connections), "bodies": part(self.limits.bodies)}
        )
        admission = self.admission.model_copy(update=bounds)
        return self.model_copy(
            update={"admission": admission, "clients": clients, "retries": retries, "limits": limits}
        )

    def client_keys(self) -> list[tuple[str, SecretStr]]:
        """Every client's name and key. Those of `api_keys` are named by their position, never by the secret."""
        numbered = [(f"key-{number}", key) for number, key in enumerate(self.api_keys, 1)]
        return numbered + [(client.name, client.key) for client in self.clients]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: object,
        **more: object,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # What `build_settings` has gathered comes in as one argument, in the order of rank. `environment.py` reads the
        # environment, since pydantic-settings' own source knows neither Kubernetes' variables nor misspelt names.
        values = cast(InitSettingsSource, init_settings).init_kwargs
        layers = cast("tuple[Mapping[str, Any], ...]", values.pop(_LAYERS, ()))
        return init_settings, *(InitSettingsSource(settings_cls, dict(layer)) for layer in layers)


_LAYERS = "layers"
_environment: ContextVar[Mapping[str, str]] = ContextVar("environment", default=os.environ)
"""Where `env:NAME` is looked up."""


def build_settings(
    flags: Mapping[str, Any], file_values: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Settings:
    """The settings from flags, environment and file.

    Arguments:
        flags, file_values: nested mappings of setting names.
        environment: the process's own, where none is given.
    Raises:
        pydantic.ValidationError: a value is wrong or a key unknown.
    """
    environment = os.environ if environment is None else environment
    variables = read_variables(environment, setting_names())
    layers: dict[str, Any] = {_LAYERS: (flags, variables.values, file_values, variables.defaults)}
    token = _environment.set(environment)
    try:
        return Settings(**layers)
    finally:
        _environment.reset(token)


@cache
def setting_names() -> frozenset[str]:
    """The dotted names of all settings."""
    return frozenset(name for name, _ in leaves())


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """Every setting with its dotted name."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        if _is_group(field):
            found += leaves(cast("type[BaseModel]", field.annotation), f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def _is_group(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Group)
