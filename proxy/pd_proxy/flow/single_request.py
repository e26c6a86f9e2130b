"""The one-leg routes, and the state of one request to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from pd_proxy.errors import BackendError
from pd_proxy.fleet.backend import Backend, Role
from pd_proxy.fleet.retry_budget import Permit
from pd_proxy.flow.request import EVENT_STREAM
from pd_proxy.flow.suspicion import Cuts
from pd_proxy.http.response import ClientResponse
from pd_proxy.telemetry.records import RequestRecord, Stage

# Prompts without a decode phase go to prefill, where they delay no stream. So does tokenising: prefill's API servers
# tokenise every prompt anyway, while those of decode write every token of every stream.
_PREFILL_LIKE: tuple[Role, ...] = ("mixed", "prefill", "decode")
# Routes that generate text go to decode.
_DECODE_LIKE: tuple[Role, ...] = ("mixed", "decode", "prefill")


@dataclass(frozen=True, slots=True)
class Route:
    """A one-leg route.

    Attributes:
        endpoint: its name in metrics.
        roles: the pools that may serve it, the best first.
        computes: the model runs for it. The outcomes of other routes are not reported to the outlier detector, since an
            engine that can still tokenise would look healthy.
        form: the request is a multipart form, which is sent on as it arrives.
    """

    endpoint: str
    roles: tuple[Role, ...] = _PREFILL_LIKE
    computes: bool = True
    form: bool = False


ROUTES: dict[str, Route] = {
    "/v1/chat/completions/batch": Route("batch", _DECODE_LIKE),
    "/v1/chat/completions/render": Route("render", computes=False),
    "/v1/completions/render": Route("render", computes=False),
    "/v1/messages/render": Route("render", computes=False),
    "/v1/responses/render": Route("render", computes=False),
    "/v1/embeddings": Route("embeddings"),
    "/v1/rerank": Route("rerank"),
    "/v2/rerank": Route("rerank"),
    "/rerank": Route("rerank"),
    "/v1/score": Route("score"),
    "/score": Route("score"),
    "/pooling": Route("pooling"),
    "/classify": Route("classify"),
    "/v1/moderations": Route("moderations"),
    "/v1/audio/transcriptions": Route("transcriptions", _DECODE_LIKE, form=True),
    "/v1/audio/translations": Route("translations", _DECODE_LIKE, form=True),
    "/tokenize": Route("tokenize", computes=False),
    "/detokenize": Route("detokenize", computes=False),
    "/v1/messages/count_tokens": Route("count_tokens", computes=False),
}


class Source(Protocol):
    """A request body that is still arriving.

    Attributes:
        content_type: of the body that the engine gets.
        kept: everything that has arrived, as long as it is short enough to be sent again; else None.
        model: the model that it asks for, once it has arrived.
        whole: all of it has arrived.
    """

    @property
    def content_type(self) -> bytes: ...
    @property
    def kept(self) -> bytearray | None: ...
    @property
    def model(self) -> str | None: ...
    @property
    def whole(self) -> bool: ...

    async def more(self) -> bytes:
        """The next piece, which may be empty. Must not be called once the body is whole.

        Raises:
            GatewayError, or the exception of the HTTP surface for a client that has left.
        """


class SingleRequest(msgspec.Struct):
    """A client's request.

    Attributes:
        path: the route, at the gateway and at the engine.
        body: JSON, or a form that is still arriving.
        model: None where the request names none, or where it has not arrived.
        tokens: the estimated load of its leg.
        avoid: URLs of backends that have failed it.
        cuts: the engines that may have died with it, or None.
        hops: the gateways that it has passed through; empty where it came from a client.
        backend: the backend of the last try.
        error: why the last try failed.
        permit: of the retry budget, for a try that could amplify an overload.
        retried: the leg that failed last and the reason, until the next try is placed.
        unplaceable: no backend is up for the next try.
    """

    path: str
    client: ClientResponse
    record: RequestRecord
    body: bytes | Source
    model: str | None
    tokens: int
    avoid: set[str] = msgspec.field(default_factory=set)
    cuts: Cuts | None = None
    hops: bytes = b""
    backend: Backend | None = None
    error: BackendError | None = None
    permit: Permit | None = None
    retried: tuple[str, str] | None = None
    unplaceable: bool = False

    @property
    def route(self) -> Route:
        return ROUTES[self.path]

    @property
    def again(self) -> bool:
        """Whether it can be sent once more."""
        return isinstance(self.body, bytes) or self.body.kept is not None

    def begin_stream(self) -> None:
        """The present try has events for the client: start the answer's stream."""
        self.give_permit_back()
        self.record.status = 200
        self.record.reach(Stage.STREAMING)
        self.client.start(200, self.headers(*EVENT_STREAM))

    def headers(self, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """The head of the answer to the client."""
        return [(b"x-request-id", self.record.request_id.encode("ascii")), *more]

    def give_permit_back(self) -> None:
        if self.permit is not None:
            self.permit.release()
            self.permit = None
