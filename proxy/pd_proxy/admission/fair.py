"""The fair queue: the order in which waiting requests are admitted.

A higher priority goes first. Within a priority, clients share the capacity by weight, as in start-time fair queueing
(Goyal, Vin and Cheng 1996; with several requests served at once: Jin, Chase and Kaur 2004, SFQ(D)):

- The start tag of a request is the finish tag of the request before it of the same client, or the virtual time where
  that is later.
- The finish tag is the start tag plus the request's tokens divided by the client's weight.
- The virtual time is the start tag of the request that was admitted last.
- The request with the smallest start tag is next.

So a client gets no credit for time in which it was idle, and no penalty for capacity that no other client wanted.

A request gets its tag when it becomes the head of its client's queue, and its tokens are charged when it is admitted. A
request that stops waiting before costs its client nothing.

Within a client's queue the request that has to start first goes first (`Ticket.due`; earliest deadline first, Liu and
Layland 1973). Without targets this is the order of arrival. Requests that can no longer meet their target go behind all
others, since each of them would make the next one late as well.

Each model has a queue of its own. No request of a model overtakes the head of its model's queue, not even a smaller one
that would fit, so the head cannot starve. Requests for other models may overtake it, since they use other backends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Container, Iterator

from pd_proxy.admission.clients import Client
from pd_proxy.admission.ticket import Ticket

Key = tuple[int, float, int]
"""(negated priority, start tag, number in the order of arrival): the smallest is next."""

_MAX_COST = 2**20
"""The most tokens that one request is charged. The bound keeps a client's `max_tokens` from making its tags huge."""


def cost(ticket: Ticket) -> int:
    """The tokens that a request is charged."""
    tokens = ticket.tokens
    return 1 if tokens < 1 else tokens if tokens < _MAX_COST else _MAX_COST


def charge(ticket: Ticket, start: float) -> None:
    """Charge an admitted request to its client.

    Arguments:
        start: the request's start tag.
    """
    client = ticket.client
    level = client.level
    if start > level.virtual:
        level.virtual = start
    client.finish = start + cost(ticket) / client.weight


def _urgency(ticket: Ticket) -> tuple[bool, float, int]:
    """The sort key of the requests of one client: the smallest is next."""
    return ticket.best_effort, ticket.due, ticket.number


def start_tag(client: Client) -> float:
    """The start tag of a request that arrives now, where its client has no other one waiting."""
    virtual, finish = client.level.virtual, client.finish
    return virtual if virtual > finish else finish


class ClientQueue:
    """The waiting requests of one client for one model, the most urgent first.

    Attributes:
        born: the virtual time when the first request came into the empty queue.
        cost: the sum of the costs of its requests.
        latest: the highest arrival number of all requests that have been its head.
        in_heap: whether it is in the heap of its `ModelQueue`.
    """

    __slots__ = ("born", "client", "cost", "in_heap", "latest", "tickets")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.tickets: list[Ticket] = []
        self.born = 0.0
        self.cost = 0
        self.latest = 0
        self.in_heap = False

    def add(self, ticket: Ticket) -> None:
        insort(self.tickets, ticket, key=_urgency)
        self.cost += cost(ticket)

    def remove(self, ticket: Ticket) -> None:
        del self.tickets[bisect_left(self.tickets, _urgency(ticket), key=_urgency)]
        self.cost -= cost(ticket)

    def start(self) -> float:
        """The start tag of its head. It never decreases, since neither of the two values does."""
        return max(self.born, self.client.finish)

    def key(self) -> Key:
        self.latest = max(self.latest, self.tickets[0].number)  # a key must never decrease: `ModelQueue._heap`
        return -self.client.level.priority, self.start(), self.latest

    def last_start(self) -> float:
        """The start tag of a request behind all of these, if none of them stops waiting."""
        return self.start() + self.cost / self.client.weight


class ModelQueue:
    """The waiting requests for one model, in a queue for each client.

    The heap holds each client's queue once, under a key that may be smaller than its present one. When such an entry is
    at the top, it is moved to its present key. An empty queue is dropped there.
    """

    __slots__ = ("_heap", "clients", "count", "model")

    def __init__(self, model: str | None) -> None:
        self.model = model
        self.clients: dict[Client, ClientQueue] = {}
        self.count = 0
        self._heap: list[tuple[Key, ClientQueue]] = []

    def push(self, ticket: Ticket) -> None:
        queue = self.clients.get(ticket.client)
        if queue is None:
            queue = self.clients[ticket.client] = ClientQueue(ticket.client)
        if not queue.tickets:
            queue.born = ticket.client.level.virtual
        queue.add(ticket)
        self.count += 1
        if not queue.in_heap:
            queue.in_heap = True
            heapq.heappush(self._heap, (queue.key(), queue))

    def remove(self, ticket: Ticket) -> None:
        self.clients[ticket.client].remove(ticket)
        self.count -= 1

    def head(self) -> tuple[Key, ClientQueue] | None:
        """The client's queue whose head is next, with its key."""
        heap = self._heap
        while heap:
            key, queue = heap[0]
            if not queue.tickets:
                heapq.heappop(heap)
                queue.in_heap = False
                del self.clients[queue.client]
                continue
            now = queue.key()
            if now == key:
                return key, queue
            heapq.heapreplace(heap, (now, queue))
        return None


class FairQueue:
    """All waiting requests.

    Attributes:
        count: how many there are.
        size: the bytes of their bodies.
    """

    def __init__(self) -> None:
        self.count = 0
        self.size = 0
        self._models: dict[str | None, ModelQueue] = {}
        self._arrivals = 0

    def __iter__(self) -> Iterator[Ticket]:
        for queue in self._client_queues():
            yield from queue.tickets

    def push(self, ticket: Ticket) -> None:
        """Put a new request into its client's queue."""
        self._arrivals += 1
        ticket.number = self._arrivals
        model_queue = self._models.get(ticket.model)
        if model_queue is None:
            model_queue = self._models[ticket.model] = ModelQueue(ticket.model)
        model_queue.push(ticket)
        self.count += 1
        self.size += ticket.size

    def make_best_effort(self, ticket: Ticket) -> None:
        """Put a waiting request that has missed its target behind those requests of its client that can meet theirs."""
        queue = self._models[ticket.model].clients[ticket.client]
        queue.remove(ticket)
        ticket.best_effort = True
        queue.add(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Remove a request from any position in the queue."""
        model_queue = self._models[ticket.model]
        model_queue.remove(ticket)
        self.count -= 1
        self.size -= ticket.size
        if not model_queue.count:
            del self._models[ticket.model]

    def first(self, blocked: Container[str | None]) -> Ticket | None:
        """The next request of those whose model is not in `blocked`."""
        best: tuple[Key, ClientQueue] | None = None
        for model_queue in self._models.values():
            if (
                model_queue.model not in blocked
                and (head := model_queue.head()) is not None
                and (best is None or head[0] < best[0])
            ):
                best = head
        return None if best is None else best[1].tickets[0]

    def take(self, ticket: Ticket) -> None:
        """Remove the head of a client's queue, and charge it to its client."""
        charge(ticket, self._models[ticket.model].clients[ticket.client].start())
        self.remove(ticket)

    def ahead(self, ticket: Ticket) -> int:
        """Estimate how many waiting requests would be admitted before a request that arrives now.

        The estimate uses the mean cost of the requests in each client's queue.
        """
        mine = self._client_queue(ticket)
        priority, start = ticket.client.level.priority, self._start(ticket)
        found = 0
        for queue in self._client_queues():
            client = queue.client
            if queue is mine or client.level.priority > priority:
                found += len(queue.tickets)
            elif client.level.priority == priority and (gap := start - queue.start()) >= 0:
                mean = queue.cost / len(queue.tickets) / client.weight
                found += min(len(queue.tickets), int(gap / mean) + 1)
        return found

    def to_displace(self, ticket: Ticket) -> Ticket | None:
        """The request to remove from a full queue in favour of a new one: the request whose turn would be last. None
        where that is the new one itself."""
        worst = (-ticket.client.level.priority, self._start(ticket))
        last: Ticket | None = None
        for queue in self._client_queues():
            tail = queue.tickets[-1]
            key = -queue.client.level.priority, queue.last_start() - cost(tail) / queue.client.weight
            if key > worst:
                worst, last = key, tail
        return last

    def _start(self, ticket: Ticket) -> float:
        """The start tag that a request which arrives now would have as the head of its client's queue."""
        queue = self._client_queue(ticket)
        return queue.last_start() if queue is not None else start_tag(ticket.client)

    def _client_queue(self, ticket: Ticket) -> ClientQueue | None:
        model_queue = self._models.get(ticket.model)
        queue = model_queue.clients.get(ticket.client) if model_queue is not None else None
        return queue if queue is not None and queue.tickets else None

    def _client_queues(self) -> Iterator[ClientQueue]:
        for model_queue in self._models.values():
            for queue in model_queue.clients.values():
                if queue.tickets:
                    yield queue
