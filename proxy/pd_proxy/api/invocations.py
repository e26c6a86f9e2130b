"""/invocations: SageMaker's only route, where the members of the body decide which route of the gateway serves it.

The request is then served as if it had come to that route, with the same keys, limits and errors. No other path of an
engine can be reached through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_proxy.api.arrival import ClientLeft, check_length, identify, read_whole
from pd_proxy.api.credentials import Credentials
from pd_proxy.api.surface import answer
from pd_proxy.errors import GatewayError, InvalidRequest, MethodNotAllowed
from pd_proxy.http.response import EXTENSION
from pd_proxy.http.server_exchange import ServerExchange
from pd_proxy.requests.members import read_members
from pd_proxy.settings.tree import Settings

PATH = "/invocations"

# In vLLM's order. A body is for the first route whose members it has and that some engine here offers.
_SHAPES: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (frozenset({"messages"}), ("/v1/chat/completions",)),
    (frozenset({"prompt"}), ("/v1/completions",)),
    (frozenset({"query", "documents"}), ("/v1/rerank", "/rerank", "/v2/rerank")),
    (frozenset({"text_1", "text_2"}), ("/v1/score", "/score")),
    (frozenset({"queries", "documents"}), ("/v1/score", "/score")),
    (frozenset({"data_1", "data_2"}), ("/v1/score", "/score")),
    (frozenset({"input"}), ("/v1/embeddings", "/classify", "/pooling")),
)


class Invocations:
    """Serves /invocations.

    Arguments:
        apps: the applications of the routes that engines serve, by path.
        offered: returns the paths that some engine has, as far as is known.
    """

    def __init__(
        self,
        settings: Settings,
        credentials: Credentials,
        apps: Mapping[str, ASGIApp],
        offered: Callable[[], AbstractSet[str]],
    ) -> None:
        self._limit = settings.limits.request_body
        self._seconds = settings.timeouts.request_body
        self._credentials = credentials
        self._apps = apps
        self._offered = offered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client: ServerExchange | None = scope.get("extensions", {}).get(EXTENSION)
        try:
            if scope["method"] != "POST":
                raise MethodNotAllowed(f"{PATH} takes POST", allow="POST")
            headers: dict[bytes, bytes] = dict(scope["headers"])
            self._credentials.check_client(headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))
            check_length(headers, self._limit)
            body = await read_whole(client, receive, headers, self._limit, self._seconds)
            path = self._route(read_members(bytes(body)).keys())
        except ClientLeft:
            return
        except GatewayError as error:
            refusal = answer(error)
            refusal.headers["x-request-id"] = identify(dict(scope["headers"]))
            await refusal(scope, receive, send)
            return
        if client is not None:
            client.put_back(body)
        else:
            receive = _again(bytes(body), receive)
        # The body has been decoded.
        plain = [header for header in scope["headers"] if header[0] != b"content-encoding"]
        await self._apps[path]({**scope, "path": path, "headers": plain}, receive, send)

    def _route(self, members: AbstractSet[str]) -> str:
        """The route for a body with these members.

        Raises:
            InvalidRequest: no route has such bodies.
        """
        shaped = [path for needs, paths in _SHAPES if needs <= members for path in paths if path in self._apps]
        offered = self._offered()
        for path in [path for path in shaped if path in offered] or shaped:
            return path
        known = "; ".join(" and ".join(sorted(needs)) for needs, _ in _SHAPES)
        raise InvalidRequest(f"{PATH} has no route for this body; a body needs one of: {known}")


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` whose first message is a body that has been read already."""
    pieces: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Message:
        return next(pieces, None) or await receive()

    return receive_again
