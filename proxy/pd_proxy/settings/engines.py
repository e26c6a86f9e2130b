"""The groups of settings that describe engines: where they are, what they speak, and where they report."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pd_proxy.settings.addresses import (
    BackendUrls,
    Networks,
    PublisherEndpoint,
    SocketAddress,
    backend_url,
    own_url,
    split_list,
)
from pd_proxy.settings.types import NAME, ConnectorChoice, Group, KindName, Ports, Seconds, parsed_list

DEFAULT_GROUP = "default"
"""The name of the group that the top level's backends make up."""


class KvEventsSettings(Group):
    """KV events, which engines publish over ZeroMQ about their prefix caches ([KV events](kv-events.md)): vLLM and
    SGLang with `--kv-events-config`. They correct the prefix index."""

    endpoint: PublisherEndpoint = Field(
        "",
        description="where each engine publishes, as `tcp://{host}:5557` with the host of its URL; data-parallel rank "
        "n publishes at this port plus n; empty: off",
    )
    replay: PublisherEndpoint = Field(
        "", description="where missed events are requested (`replay_endpoint`), in the same form; empty: they are lost"
    )
    topic: str = Field("", max_length=256, description="the topic of the events; empty: any")

    @model_validator(mode="after")
    def _replays_what_is_heard(self) -> KvEventsSettings:
        if self.replay and not self.endpoint:
            raise ValueError("kv_events: replay without an endpoint; set where the engines publish")
        if self.replay and self.replay == self.endpoint:
            raise ValueError("kv_events: replay is an endpoint of its own (replay_endpoint of --kv-events-config)")
        return self


class BackendGroup(Group):
    """Backends that hand over to each other, beside those of the top level: a second fleet of prefill and decode nodes,
    with another model or another engine."""

    name: str = Field(pattern=NAME, description="its name in logs and /admin; letters, digits, ._-")
    kind: KindName = Field("vllm", description="the type of its engines")
    connector: ConnectorChoice = Field(
        "nixl", description="the hand-off protocol of its engines; auto: the one that they report"
    )
    prefill: BackendUrls = Field((), description="URLs of its prefill backends")
    decode: BackendUrls = Field((), description="URLs of its decode backends")
    mixed: BackendUrls = Field((), description="URLs of its backends that do both")
    encode: BackendUrls = Field((), description="URLs of its encoders of images, audio and video")
    kv_events: KvEventsSettings = Field(
        KvEventsSettings(), description="where its engines publish KV events: endpoint, replay and topic; none: off"
    )


class Location(Group):
    """The address of a backend's side of the hand-off, for connectors that need it. What an engine reports by itself
    need not be set."""

    backend: Annotated[str, AfterValidator(backend_url)] = Field(description="the backend's URL, as in its pool")
    host: str = Field("", description="as its peers reach it; empty: its URL's host")
    port: int = Field(
        0, ge=0, le=65535, description="of its bootstrap server, side channel or handshake; 0: the connector's default"
    )
    notify_port: int = Field(
        0, ge=0, le=65535, description="its port for notifications of transfers, for connectors that have one"
    )
    init_ports: Ports = Field((), description="init ports of a receiver: one for each tensor-parallel rank")
    alloc_ports: Ports = Field((), description="its allocation ports, one for each rank")
    query_ports: Ports = Field((), description="its query ports, one for each rank")
    engine_ids: Annotated[tuple[str, ...], BeforeValidator(split_list)] = Field(
        (), description="its connector's engine id, one for each data-parallel rank"
    )
    kv_events_port: int = Field(
        0, ge=0, le=65535, description="where it publishes KV events; 0: the port of its group's kv_events.endpoint"
    )
    kv_replay_port: int = Field(
        0, ge=0, le=65535, description="where missed events are requested; 0: the port of its group's kv_events.replay"
    )
    tp: int = Field(1, ge=1, description="tensor-parallel ranks")
    pp: int = Field(1, ge=1, description="pipeline ranks")
    dp: int = Field(
        1,
        ge=1,
        description="data-parallel ranks behind its URL; with several, each leg is sent to the least loaded, or where "
        "`auto` or `prefix` places prompts to the one that will have computed the prompt first",
    )


Groups = Annotated[tuple[BackendGroup, ...], parsed_list('[{"name": "…", "prefill": ["…"], "decode": ["…"]}]')]


Locations = Annotated[tuple[Location, ...], parsed_list('[{"backend": "…", "port": …}]')]


class ZmqSettings(Group):
    """Sockets for messages of engines over ZeroMQ. They have no authentication: bind them to an internal address
    ([connectors](connectors.md#zeromq))."""

    notices: SocketAddress = Field(
        "",
        description="address for notifications that a KV cache arrived: LMCache's `pd_proxy_host` and `pd_proxy_port`",
    )
    registrations: SocketAddress = Field(
        "", description="address at which engines register: their `proxy_ip` and `proxy_ping_port` or `proxy_port`"
    )
    expiry: Seconds = Field(
        10.0, description="seconds after an engine's last registration until it is down; engines register every 3 s"
    )
    networks: Networks = Field(
        (), description="networks whose engines may join by registering; none: only configured backends register"
    )
    group: str = Field(DEFAULT_GROUP, description="the group that engines join by registering")


class Metaserver(Group):
    """The gateway's URL for decode engines that call it back, for the connector ascend_layerwise
    ([connectors](connectors.md#ascend_layerwise))."""

    url: Annotated[str, AfterValidator(own_url)] | None = Field(
        None, description="this gateway as engines reach it (http://host:port); they call /v1/metaserver there"
    )
    allow: Networks = Field((), description="networks from which engines may call; none: any address")
