"""/admin/decisions: the last placement decisions and their reasons; /admin/explain: the decision for a given body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from pd_proxy.api.admin.backends import time_of_day
from pd_proxy.api.credentials import Credentials
from pd_proxy.api.inference import bounded, not_stored
from pd_proxy.api.operations import operator
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.model_names import Names
from pd_proxy.flow.decisions import MOST, Decisions
from pd_proxy.flow.request import Request as Placed
from pd_proxy.flow.stored_responses import StoredResponses
from pd_proxy.http.response import AsgiResponse
from pd_proxy.requests.body import read_body, renamed
from pd_proxy.requests.endpoints import Endpoint
from pd_proxy.requests.sessions import session_of
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import RequestRecord
from pd_proxy.workers.peers import PeerWorkers

EXPLAIN_PATH = "/admin/explain"
_USUAL = 100

Explain = Callable[[Placed], dict[str, Any]]


class DecisionsQuery(BaseModel):
    """The decisions to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(_USUAL, ge=1, le=MOST, description="how many, the latest first")
    request_id: str = Field("", max_length=128, description="only those for requests with this X-Request-Id")


class ExplainQuery(BaseModel):
    """The client and the route of the request to explain."""

    model_config = ConfigDict(extra="forbid")

    endpoint: Endpoint = Field("chat", description="the route that the body is for")
    client: str = Field("", max_length=256, description="a client's name in the settings, whose targets count")


def onlooker(credentials: Credentials) -> Callable[[Request], Awaitable[None]]:
    """A dependency that admits operators who may read: explaining is a POST, but changes nothing."""

    async def check(request: Request) -> None:
        credentials.check_operator({**request.scope, "method": "GET"})

    return check


def decisions(
    noted: Decisions,
    credentials: Credentials,
    peers: PeerWorkers | None = None,
) -> APIRouter:
    """The route of the last decisions, for operators. With several workers it shows those of all."""
    router = APIRouter(tags=["administration"], dependencies=[Depends(operator(credentials))])

    @router.get("/admin/decisions")
    async def list_decisions(query: Annotated[DecisionsQuery, Query()]) -> dict[str, Any]:
        """The last decisions of placement, the latest first. Each names the chosen backends and the reason, the
        estimates for all candidates, the backends that were excluded with the rule that excluded them, and the outcome
        of the request. Where `complete` is false, it has the estimates of the chosen backends only."""
        found = [_dated(one) for one in noted.last(query.limit, query.request_id)]
        if peers is not None:
            found += await peers.decisions(query.limit, query.request_id)
            found.sort(key=lambda one: str(one["at"]), reverse=True)
        return {"decisions": found[: query.limit]}

    return router


def explanation(
    settings: Settings,
    explain: Explain,
    fleet: Fleet,
    stored: StoredResponses,
    names: Names,
    credentials: Credentials,
) -> APIRouter:
    """The route that explains where a request would go, for operators.

    Arguments:
        explain: decides about a request without sending it.
        stored: names stored responses by the backends that have them.
    """
    router = APIRouter(tags=["administration"], dependencies=[Depends(onlooker(credentials))])
    usual, most = settings.limits.default_max_tokens, settings.limits.max_tokens
    header = settings.policy.session_header

    @router.post(EXPLAIN_PATH)
    async def explain_body(request: Request, query: Annotated[ExplainQuery, Query()]) -> dict[str, Any]:
        """The decision that a request with this body would get now. The request is not sent to an engine and is not
        counted. The queue is left out: the request counts as admitted. Ties and random policies may be decided
        differently for the real request."""
        body = bounded(read_body(await request.body(), query.endpoint), usual, most)
        model = await names.resolve(body.model)
        if model is not None and model != body.model:
            body = renamed(body, model)
        record = RequestRecord(query.endpoint, model=body.model or "", client=query.client, stream=body.stream)
        session = request.headers.get(header, "").encode("latin-1") or session_of(body)
        placed = Placed(body, AsgiResponse(_nothing, _nowhere), record, session=session)
        if body.follows:
            placed.affinity = stored.holder(body.follows, query.client, (backend.url for backend in fleet))
            if not placed.affinity:
                raise not_stored(body.follows, param="previous_response_id")
        return _dated(explain(placed))

    return router


def _dated(decision: dict[str, Any]) -> dict[str, Any]:
    """A decision with date and time in the place of the monotonic time."""
    return {**decision, "at": time_of_day(decision["at"], "milliseconds")}


async def _nothing() -> MutableMapping[str, Any]:
    return {"type": "http.disconnect"}


async def _nowhere(message: MutableMapping[str, Any]) -> None:
    """Discard the message: no client waits for an answer."""
