"""The fields of the settings tree."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from pd_proxy.settings.addresses import BackendUrls, SocketPath, listening_host
from pd_proxy.settings.bounds import (
    AdmissionSettings,
    BreakerSettings,
    Clients,
    CorsSettings,
    Health,
    Limits,
    MetricsSettings,
    Policies,
    Retries,
    Routes,
    Shutdown,
    Targets,
    Timeouts,
)
from pd_proxy.settings.engines import (
    DEFAULT_GROUP,
    BackendGroup,
    Groups,
    KvEventsSettings,
    Locations,
    Metaserver,
    ZmqSettings,
)
from pd_proxy.settings.secrets import Secret, Secrets
from pd_proxy.settings.types import Aliases, ConnectorChoice, Group, KindName, LogLevel, SecondsOrZero


class SettingsFields(Group, BaseSettings):
    """Everything that can be set, without the checks of one against another."""

    model_config = SettingsConfigDict(validate_default=False)

    host: Annotated[str, AfterValidator(listening_host)] = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 for all, as in a container"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    reuse_port: bool = Field(
        False, description="let a new gateway of the same user listen beside this one, to take over from it"
    )
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve as one gateway; one relays some ten thousand tokens/s"
    )
    prefill: BackendUrls = Field((), description="a prefill backend's URL; may be repeated")
    decode: BackendUrls = Field((), description="a decode backend's URL; may be repeated")
    mixed: BackendUrls = Field((), description="URL of a backend that does both; may be repeated")
    kind: KindName = Field(
        "vllm",
        description="the type of the engines, which decides their paths for health and version, and their routes",
    )
    encode: BackendUrls = Field(
        (),
        description="URL of an encoder of images, audio and video, whose output the other engines use; may be repeated",
    )
    connector: ConnectorChoice = Field(
        "nixl", description="the hand-off protocol of the engines; auto: the one that they report"
    )
    groups: Groups = Field(
        (), description="further fleets of backends, each with a connector of its own; no hand-off leaves its group"
    )
    locations: Locations = Field(
        (), description="addresses of the engines' side of the hand-off, for connectors that need them"
    )
    aliases: Aliases = Field(
        {}, description="other names that clients may use for a model: the alias, and the engines' own name"
    )
    default_model: str = Field(
        "", description="the model of requests that name none; empty: that of the engines, if they have only one"
    )
    unknown_model: Literal["reject", "default"] = Field(
        "reject",
        description="a request for a model that no engine has is answered with 404, or served by default_model",
    )
    pair_revisions: Literal["strict", "any"] = Field(
        "strict", description="pair only engines that report the same version and model root, or any"
    )
    fallback: Literal["local_prefill", "reject"] = Field(
        "local_prefill", description="without a hand-off decode computes the prompt, or the answer is an error"
    )
    resume: Literal["exact", "best_effort", "off"] = Field(
        "exact",
        description="a stream whose backend dies is continued only where that is exact, wherever possible, or never",
    )
    first_token: Literal["auto", "prefill", "decode"] = Field(
        "auto",
        description="the first token is prefill's where that is exact, wherever it is safe, or always decode's",
    )
    reuse_tokens: bool = Field(
        True, description="decode gets the prompt's token ids from prefill where possible, instead of tokenising again"
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
        True,
        description="send a request for one token through each new pair, so that no client waits for its handshake",
    )
    ready_by_fallback: bool = Field(
        False,
        description="/ready is 200 before a pair has handed over, as long as decode can serve alone (fallback); "
        "otherwise it is 503 until a warm-up has worked",
    )
    admission: AdmissionSettings = AdmissionSettings()
    shutdown: Shutdown = Shutdown()
    metrics: MetricsSettings = MetricsSettings()
    metaserver: Metaserver = Metaserver()
    zmq: ZmqSettings = ZmqSettings()
    kv_events: KvEventsSettings = KvEventsSettings()
    tokenizer: str = Field(
        "",
        description="path of the model's `tokenizer.json`, with which KV events also apply to prompts of text; "
        "needs the extra `tokenizers` ([KV events](kv-events.md#prompts-of-text))",
    )
    api_keys: Secrets = Field((), description="keys, of which clients must send one as a bearer token; none: open")
    clients: Clients = Field((), description="clients with their own names, keys, bounds and shares, beside api_keys")
    admin_key: Secret | None = Field(
        None,
        description="key for operators' routes (/admin, /instances, /reset_prefix_cache, the profiler); none: programs "
        "on this machine may read, and changes are possible only at admin_socket",
    )
    admin_socket: SocketPath = Field(
        "", description="path of a unix socket, for the gateway's own user, at which operators need no key; empty: none"
    )
    backend_api_key: Secret | None = Field(None, description="bearer token the gateway sends to the backends")
    handoff_key: Secret | None = Field(
        None, description="key shared with TensorRT-LLM's generation servers, with which hand-offs to them are signed"
    )
    log_level: LogLevel = Field("info", description="the lowest level that is logged")
    log_format: Literal["text", "json"] = Field("text", description="the format of log lines")
    access_log: bool = Field(False, description="log a line for every request, not only for failed ones")
    throughput_interval: SecondsOrZero = Field(
        60.0, description="seconds between log lines with the throughput, while there are requests; 0: none"
    )

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

    def client_keys(self) -> list[tuple[str, SecretStr]]:
        """Every client's name and key. Those of `api_keys` are named by their position, never by the secret."""
        numbered = [(f"key-{number}", key) for number, key in enumerate(self.api_keys, 1)]
        return numbered + [(client.name, client.key) for client in self.clients]
