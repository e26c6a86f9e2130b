"""/v1/metaserver: the route that decode engines call during a hand-off, with connectors that use callbacks.

A call is answered at once, and wakes the try that waits for it. Calls need no key, since engines send none. A caller
has to know the id of a try, which only the gateway hands out, and `metaserver.allow` restricts the callers' addresses.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pd_proxy.errors import CallUnexpected, Forbidden, InvalidRequest
from pd_proxy.flow.callbacks import PATH, Callbacks
from pd_proxy.workers.peers import PeerWorkers

log = logging.getLogger("pd_proxy.api")


def metaserver(
    callbacks: Callbacks, allow: Sequence[IPv4Network | IPv6Network], peers: PeerWorkers | None = None
) -> APIRouter:
    """The route.

    Arguments:
        allow: networks from which engines may call; empty: any address.
        peers: the other workers of this gateway; a call for a try of theirs is forwarded.
    """
    router = APIRouter(tags=["engines"])

    def may_call(host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in allow)

    @router.post(PATH, response_model=None)
    async def call(request: Request) -> dict[str, str] | Response:
        """Callback of a decode engine that has allocated KV cache blocks for a request: it reports where they are."""
        host = request.client.host if request.client is not None else ""
        if allow and not may_call(host):
            log.warning("%s may not call back: it is in no network of metaserver.allow", host)
            raise Forbidden("this address may not call back; see metaserver.allow")
        body = await request.body()
        if peers is not None and (worker := callbacks.elsewhere(body)) is not None:
            answer = await peers.forward(worker, PATH, body)
            if answer is not None:
                return Response(answer.body, status_code=answer.status, media_type="application/json")
        try:
            callbacks.called(body)
        except (CallUnexpected, InvalidRequest) as error:
            log.info("a callback from %s was refused: %s", host, error)
            raise
        return {"status": "ok"}

    return router
