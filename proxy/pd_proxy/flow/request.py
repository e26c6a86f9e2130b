"""The state of one request with two legs."""

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

# The load in tokens that a completion adds to a decode backend if the client sets no bound. It needs to be right only
# for the average of many requests, which lies between short chat answers and long reasoning.
EXPECTED_OUTPUT = 512


class Request(msgspec.Struct):
    """A client's request.

    Attributes:
        transcript: the part of a stream that the client has; None for an answer in one piece.
        token_ids: engines are asked for token ids, so that the stream can be resumed.
        continuation: where the next try continues, once the client has a part of the answer.
        cards: the models, as /v1/models lists them, of the engine that began an answer that was broken off.
        cards_of_try: the same of the engine that answers the present try.
        live: the client has been sent something of the present try's answer.
        permit: of the retry budget, for a try that could amplify an overload.
        resumes: how often the answer was continued on other backends.
        prefill: URL of the prefill backend that has this prompt in its prefix cache, or empty.
        affinity: URL of the only backend that can serve it, since that has the response which the request continues; or
            empty.
        stored: names the answer, if the client may ask for it later.
        avoid: URLs of backends that have failed it.
        error: why the last try failed.
        cuts: the engines that may have died with it, or None.
        gained: tokens that the present try's decode leg has produced.
        hops: the gateways that it has passed through (`hops.py`); empty where it came from a client.
        failed: the leg that failed last and the reason, for `note_retry`.
        failed_pool: the pool of the backend that failed last.
        prefill_tokens: the load of its prefill leg.
        decode_tokens: the load of its decode leg: the KV cache of the prompt, and the expected output.
        session: the name of its session; empty where it is not known.
        chain: the chain of its prompt, once placement has needed it.
        ask: what its last try asked of placement.
        media: its images, audio and video, once they have been looked for; empty where it has none.
        explain: the answer is to have a header that explains the decision.
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
        """A leg has reached a stage. A stream that has begun keeps its stage, whatever its legs do."""
        if not self.client.started:
            self.record.reach(stage)

    def begin_stream(self, now: float) -> None:
        """The present try has a token for the client: start the answer's stream, unless an earlier try has started
        it."""
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
        """Send the client its answer, in one piece."""
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
        headers = [(b"x-request-id", self.record.request_id.encode()), *more]
        if self.record.fallback:
            headers.append((b"x-pd-proxy-fallback", self.record.fallback.encode("ascii")))
        if self.explained:
            headers.append((b"x-pd-proxy-decision", self.explained))
        return headers


_UNDERSCORES = re.compile("__+")
_LONGEST = 64  # characters of a client's id in those of its legs: some protocols bound names at 128


def leg_id(request_id: str) -> str:
    """An id for the legs of one try, or for one leg. It begins with the id of their request.

    Its end makes it unique: a client may give several requests one id, and engines pair and abort legs by it. The end
    is longer than the eight digits that vLLM appends and removes again. Connectors look for addresses between three
    underscores, so the part from the client's id must not have them.
    """
    if not request_id:
        return new_id()
    name = request_id if request_id.find("__") < 0 else _UNDERSCORES.sub("_", request_id)
    return f"{name[:_LONGEST]}-{getrandbits(64):016x}"


def new_id() -> str:
    """An id that the gateway makes itself. It is never a client's, since engines pair and abort legs by it."""
    return f"{getrandbits(128):032x}"
