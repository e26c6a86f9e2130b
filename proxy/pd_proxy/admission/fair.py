"""Who is next: the order of those who wait.

Within a priority clients share by weight, as start-time fair queueing does it (Goyal, Vin and Cheng 1996; with several
requests served at once: Jin, Chase and Kaur 2004, SFQ(D)). A request's start tag is the finish tag of its client's
request before it, or the virtual time where that is later; its finish tag is its start tag and its tokens divided by
the client's weight; virtual time is the start tag of the request that was let in last; the smallest start tag goes
first. So who was idle does not catch up, and who used what nobody else wanted is not made to pay.

A tag is given when a request comes to the head of its client's line, and tokens are charged when it is let in: who
gives up waiting has cost its client nothing.

Within a client's line the one that has to start first goes first (`Ticket.due`; Liu and Layland 1973), which is the
order of arrival where there are no targets. Those that cannot meet their target any more are behind all others: else
each would make the next one late as well.

A lane is what waits for one model. The head of a lane is passed by nobody behind it, however small, so it cannot
starve; another lane's requests may go on, since they want other backends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Container, Iterator

from pd_proxy.admission.clients import Client
from pd_proxy.admission.ticket import Ticket

Key = tuple[int, float, int]
"""(minus priority, start tag, place in the order of arrival): the smallest is next."""

_MOST_COST = 2**20
"""Tokens that one request is charged at most: what a client writes under `max_tokens` must not blow up the tags."""


def cost(ticket: Ticket) -> int:
    """What a request is charged."""
    tokens = ticket.tokens
    return 1 if tokens < 1 else tokens if tokens < _MOST_COST else _MOST_COST


def charge(ticket: Ticket, start: float) -> None:
    """Charge a request that is let in to its client."""
    client = ticket.client
    level = client.level
    if start > level.virtual:
        level.virtual = start
    client.finish = start + cost(ticket) / client.weight


def _urgency(ticket: Ticket) -> tuple[bool, float, int]:
    """What the requests of one client are ordered by: the smallest is next."""
    return ticket.best_effort, ticket.due, ticket.number


def start_tag(client: Client) -> float:
    """The start tag of a request that comes to an empty line now."""
    virtual, finish = client.level.virtual, client.finish
    return virtual if virtual > finish else finish


class Line:
    """One client's requests in a lane, the most urgent first.

    Attributes:
        born: the virtual time when it was last empty.
        cost: of all its requests.
        place: of those of its requests that have been its head, that which arrived last.
        listed: whether it is in its lane's heap.
    """

    __slots__ = ("born", "client", "cost", "listed", "place", "tickets")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.tickets: list[Ticket] = []
        self.born = 0.0
        self.cost = 0
        self.place = 0
        self.listed = False

    def add(self, ticket: Ticket) -> None:
        insort(self.tickets, ticket, key=_urgency)
        self.cost += cost(ticket)

    def remove(self, ticket: Ticket) -> None:
        del self.tickets[bisect_left(self.tickets, _urgency(ticket), key=_urgency)]
        self.cost -= cost(ticket)

    def start(self) -> float:
        """The start tag of its head. It never falls, since neither of the two does."""
        return max(self.born, self.client.finish)

    def key(self) -> Key:
        self.place = max(self.place, self.tickets[0].number)  # keys only grow, as heaps of old keys need it
        return -self.client.level.priority, self.start(), self.place

    def last_start(self) -> float:
        """The start tag that a request behind all of these would have, were nobody to leave."""
        return self.start() + self.cost / self.client.weight


class Lane:
    """The requests for one model. Its heap holds each line once, under a key that may be too small by now: such a
    one is corrected when it comes up, and an empty line dropped."""

    __slots__ = ("_heap", "count", "lines", "model")

    def __init__(self, model: str | None) -> None:
        self.model = model
        self.lines: dict[Client, Line] = {}
        self.count = 0
        self._heap: list[tuple[Key, Line]] = []

    def push(self, ticket: Ticket) -> None:
        line = self.lines.get(ticket.client)
        if line is None:
            line = self.lines[ticket.client] = Line(ticket.client)
        if not line.tickets:
            line.born = ticket.client.level.virtual
        line.add(ticket)
        self.count += 1
        if not line.listed:
            line.listed = True
            heapq.heappush(self._heap, (line.key(), line))

    def remove(self, ticket: Ticket) -> None:
        self.lines[ticket.client].remove(ticket)
        self.count -= 1

    def head(self) -> tuple[Key, Line] | None:
        """The line whose head is next, with its key."""
        heap = self._heap
        while heap:
            key, line = heap[0]
            if not line.tickets:
                heapq.heappop(heap)
                line.listed = False
                del self.lines[line.client]
                continue
            now = line.key()
            if now == key:
                return key, line
            heapq.heapreplace(heap, (now, line))
        return None


class FairQueue:
    """Those who wait.

    Attributes:
        count: how many.
        size: bytes of their bodies.
    """

    def __init__(self) -> None:
        self.count = 0
        self.size = 0
        self._lanes: dict[str | None, Lane] = {}
        self._arrivals = 0

    def __iter__(self) -> Iterator[Ticket]:
        for line in self._lines():
            yield from line.tickets

    def push(self, ticket: Ticket) -> None:
        """Put a new request into its client's line."""
        self._arrivals += 1
        ticket.number = self._arrivals
        lane = self._lanes.get(ticket.model)
        if lane is None:
            lane = self._lanes[ticket.model] = Lane(ticket.model)
        lane.push(ticket)
        self.count += 1
        self.size += ticket.size

    def put_behind(self, ticket: Ticket) -> None:
        """A request that waits is late for its target: from now on those of its client's that are not go first."""
        line = self._lanes[ticket.model].lines[ticket.client]
        line.remove(ticket)
        ticket.best_effort = True
        line.add(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Take a request out, wherever it is."""
        lane = self._lanes[ticket.model]
        lane.remove(ticket)
        self.count -= 1
        self.size -= ticket.size
        if not lane.count:
            del self._lanes[ticket.model]

    def first(self, blocked: Container[str | None]) -> Ticket | None:
        """Who is next, of those whose model is not in `blocked`."""
        best: tuple[Key, Line] | None = None
        for lane in self._lanes.values():
            if lane.model not in blocked and (head := lane.head()) is not None and (best is None or head[0] < best[0]):
                best = head
        return None if best is None else best[1].tickets[0]

    def take(self, ticket: Ticket) -> None:
        """Take out the head of a line, and charge it."""
        charge(ticket, self._lanes[ticket.model].lines[ticket.client].start())
        self.remove(ticket)

    def ahead(self, ticket: Ticket) -> int:
        """How many of those who wait now would be let in before a request that came now; an estimate, by the mean cost
        of each line's requests."""
        mine = self._line(ticket)
        priority, start = ticket.client.level.priority, self._start(ticket)
        found = 0
        for line in self._lines():
            client = line.client
            if line is mine or client.level.priority > priority:
                found += len(line.tickets)
            elif client.level.priority == priority and (gap := start - line.start()) >= 0:
                mean = line.cost / len(line.tickets) / client.weight
                found += min(len(line.tickets), int(gap / mean) + 1)
        return found

    def gives_way(self, ticket: Ticket) -> Ticket | None:
        """Who should leave a full queue for a request that came now: the one whose turn would be last; None when that
        is the new one itself."""
        worst = (-ticket.client.level.priority, self._start(ticket))
        last: Ticket | None = None
        for line in self._lines():
            tail = line.tickets[-1]
            key = -line.client.level.priority, line.last_start() - cost(tail) / line.client.weight
            if key > worst:
                worst, last = key, tail
        return last

    def _start(self, ticket: Ticket) -> float:
        """The start tag that a request which came now would have in the end."""
        line = self._line(ticket)
        return line.last_start() if line is not None else start_tag(ticket.client)

    def _line(self, ticket: Ticket) -> Line | None:
        lane = self._lanes.get(ticket.model)
        line = lane.lines.get(ticket.client) if lane is not None else None
        return line if line is not None and line.tickets else None

    def _lines(self) -> Iterator[Line]:
        for lane in self._lanes.values():
            for line in lane.lines.values():
                if line.tickets:
                    yield line
