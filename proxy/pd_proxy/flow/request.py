"""What one request carries through its life."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import getrandbits
from typing import Any

import msgspec

from pd_proxy.errors import BackendError
from pd_proxy.fleet.backend import Role
from pd_proxy.fleet.retry_budget import Permit
from pd_proxy.flow.stored_responses import StoredResponses
from pd_proxy.flow.suspicion import Cuts
from pd_proxy.handoff.encoder import Medium
from pd_proxy.http.response import ClientResponse
from pd_proxy.placement.ask import Ask
from pd_proxy.prefix.chain import Chain
from pd_proxy.relay.transcript import Transcript
from pd_proxy.requests.body import Body
from pd_proxy.requests.continuation import Continuation
from pd_proxy.telemetry.records import RequestRecord, Stage

EVENT_STREAM = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx in front would hold tokens back otherwise
)
JSON = (b"content-type", b"application/json")

# What a completion is taken to add to a decode backend's load when the client set no bound. It only has to be right
# for the average of many requests; short chat answers and long reasoning ones meet somewhere here.
EXPECTED_OUTPUT = 512


class Request(msgspec.Struct):
    """A client's request on its way.

    Attributes:
        transcript: what a stream's client has been given; None for an answer in one piece.
        token_ids: engines are asked for token ids, so that the stream can be resumed.
        continuation: where the next try goes on, once a part of the answer has been given.
        cards: the models, as /v1/models lists them, of the engine that began an answer which was broken off.
        cards_of_try: the same of the engine that answers the present try.
        live: the client has something of the present try's answer.
        permit: of the retry budget, for a try that could amplify an overload.
        resumes: how often the answer was continued on other backends.
        prefill: URL of the prefill backend that has this prompt in its prefix cache, or empty.
        affinity: URL of the only backend that can serve it, since it has the response that the request continues; or
            empty.
        stored: gives the answer its name, when the client may ask for it later.
        avoid: URLs of backends that failed it.
        error: why the last try failed.
        cuts: the engines that may have died with it, where there are any.
        gained: tokens that the present try's decode leg has given.
        hops: the gateways that it has come through (`hops.py`); empty where it came from a client.
        failed: the leg that failed last and the reason, for `note_retry`.
        failed_pool: the pool of the backend that failed last.
        prefill_tokens: what the prefill leg puts on its backend.
        decode_tokens: what the decode leg puts on its backend: the prompt's KV cache and the output to come.
        session: names the session that it belongs to; empty where that is not known.
        chain: of its prompt, once placement has needed it.
        ask: what its last try asked of placement.
        media: its images, audio and video, once they have been looked for; empty where it has none.
        explain: the answer is to have a header that says why the request goes where it goes.
        explained: the value of that header.
    """

    body: Body
    client: ClientResponse
    record: RequestRecord
    transcript: Transcript | None = None
    token_ids: bool = False
    continuation: Continuation | None = None
    cards: Mapping[str, Mapping[str, Any]] | None = None
    cards_of_try: Mapping[str, Mapping[str, Any]] | None = None
    live: bool = False
    permit: Permit | None = None
    resumes: int = 0
    prefill: str = ""
    affinity: str = ""
    stored: StoredResponses | None = None
    avoid: set[str] = msgspec.field(default_factory=set)
    error: BackendError | None = None
    cuts: Cuts | None = None
    gained: int = 0
    hops: bytes = b""
    failed: tuple[str, str] = ("", "")
    failed_pool: Role = "decode"
    prefill_tokens: int = 0
    decode_tokens: int = 0
    media: tuple[Medium, ...] | None = None
    session: bytes = b""
    chain: Chain | None = None
    ask: Ask | None = None
    explain: bool = False
    explained: bytes = b""

    def __post_init__(self) -> None:
        self.prefill_tokens = self.body.prompt_tokens
        self.decode_tokens = self.body.prompt_tokens + max(0, self.body.max_tokens or EXPECTED_OUTPUT)

    def reach(self, stage: Stage) -> None:
        """A leg is at a stage of the request's life. A stream that has begun stays one, whatever its legs do."""
        if not self.client.started:
            self.record.reach(stage)

    def begin_stream(self, now: float) -> None:
        """The present try has a token for the client: start the answer's stream, unless another try has started it."""
        self.live = True
        self.give_permit_back()
        record = self.record
        if record.stage is not Stage.STREAMING:
            record.reach(Stage.STREAMING)
        if not self.client.started:
            record.status = 200
            record.first_token = now
            self.client.start(200, self.headers(*EVENT_STREAM))

    def respond(self, answer: bytes) -> None:
        """Give the client its answer, in one piece."""
        self.record.status = 200
        self.client.respond(200, self.headers(JSON), answer)

    def give_permit_back(self) -> None:
        if self.permit is not None:
            self.permit.release()
            self.permit = None

    def note_retry(self) -> None:
        """Another leg follows the one that failed last."""
        self.record.retries.append(self.failed)

    def headers(self, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """The head of the answer to the client."""
        headers = [(b"x-request-id", self.record.request_id.encode("ascii")), *more]
        if self.record.fallback:
            headers.append((b"x-pd-proxy-fallback", self.record.fallback.encode("ascii")))
        if self.explained:
            headers.append((b"x-pd-proxy-decision", self.explained))
        return headers


_UNDERSCORES = re.compile("__+")
_LONGEST = 64  # characters of a client's id in those of its legs: some protocols bound names at 128


def leg_id(request_id: str) -> str:
    """An id for the legs of one try, or for one leg, by which they are found from their request's.

    Its end makes it unique: several requests of a client's may have one id, and engines pair and abort legs by it. It
    is longer than the eight digits that vLLM adds and takes off again. Connectors look for addresses between three
    underscores, so a client's id must not have them.
    """
    if not request_id:
        return new_id()
    name = request_id if request_id.find("__") < 0 else _UNDERSCORES.sub("_", request_id)
    return f"{name[:_LONGEST]}-{getrandbits(64):016x}"


def new_id() -> str:
    """An id of the gateway's own. Never a client's: engines pair and abort legs by it."""
    return f"{getrandbits(128):032x}"
