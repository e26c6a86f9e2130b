"""Keeps track of which engines are believed to have which prompts in their prefix caches.

A prompt is entered in the index (`prefix/`) when it is sent, and corrected by its engine's answer. The answer also
shows how fast the engine is (`fleet/speeds.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from types import TracebackType

from pd_proxy.fleet.backend import Backend, Lease
from pd_proxy.fleet.health.kv_cache import Cache
from pd_proxy.fleet.speeds import MOST_TOKENS
from pd_proxy.fleet.zmq.kv_events import KvEvents
from pd_proxy.flow.request import Request
from pd_proxy.placement.ask import Ask
from pd_proxy.prefix.chain import EMPTY, Chain, chain_of
from pd_proxy.prefix.earlier import EarlierChains
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.requests.endpoints import LAYOUTS
from pd_proxy.telemetry.records import PrefixCounts

_MOST_TOKENS = 4  # times the estimate from the bytes of a prompt: a token has at least one byte
_TEMPLATE = 1024  # tokens that a chat template may add to a prompt
_SHORTEST = 16  # tokens: the smallest block of any known engine


class Sent:
    """The prompt of one try at its engines, until they have answered. A context manager: a prompt that is not answered
    by the end counts as not computed.

    Arguments:
        computes: the backend that prefills.
        decode: the backend that gets the hand-off; None where one backend does both.
        believed: tokens that `computes` is expected to compute.
        counts: prompt tokens that were expected and found in caches.
        most: the most tokens that the prompt can have. A larger count from an engine is not used, since the engine
        would
            look fast and get more requests than the others.
        rank, decode_rank: the ranks of `computes` and of `decode` that get it; None where there is only one.
        ranked: the legs name the rank. Otherwise the engine chooses one that the gateway does not know.
    """

    __slots__ = (
        *("_answered", "_believed", "_chain", "_computes", "_counts", "_decode", "_decode_name", "_index", "_most"),
        *("_name", "_prompt", "_rank", "_ranked", "_runs_on", "_settled", "_work"),
    )

    def __init__(
        self,
        index: PrefixIndex,
        chain: Chain,
        prompt: int,
        computes: Backend,
        decode: Backend | None,
        believed: int,
        counts: PrefixCounts,
        most: int = MOST_TOKENS,
        rank: int | None = None,
        decode_rank: int | None = None,
        *,
        ranked: bool = True,
    ) -> None:
        self._index = index
        self._most = most
        self._counts = counts
        self._chain = chain
        self._prompt = prompt
        self._computes = computes
        self._decode = decode
        self._believed = believed
        self._answered = False
        self._settled = False
        self._runs_on = False
        self._ranked = ranked
        self._name = computes.url
        self._work: list[int] | None = None
        if rank is not None and ranked:
            self._rank = rank
            self._name = computes.rank_names[rank]
            self._work = computes.rank_work  # kept, since the backend has a new list after its engine has restarted
            self._work[rank] += believed
        now = monotonic()
        computes.speeds.given(believed, now, prompt)
        self._publish()
        if chain.hashes:
            index.enter(self._name, chain, now)
            if decode is not None:
                self._decode_name = self._name_of(decode, decode_rank)
                index.enter(self._decode_name, chain, now)

    def prefilled(self, cached: int | None, prompt: int) -> None:
        """The prefill leg has answered.

        Arguments: as for `counted`.
        """
        if not self._answered:
            whole = prompt if 0 < prompt <= self._most else self._prompt
            self._answer(self._believed if cached is None or prompt > self._most else max(0, whole - cached), whole)
        self.counted(cached, prompt)

    def first_token(self) -> None:
        """The leg that answers the client has its first token, so its engine has the prompt. An engine that computed
        the prompt reports at the end of its answer how much was cached."""
        if not self._answered:
            self._answer(self._believed, self._prompt)
        decode, self._decode = self._decode, None
        if decode is not None and self._chain.hashes:
            self._index.settle(self._decode_name, self._chain)

    def ended(self) -> None:
        """The leg that answers the client has ended well, in one piece. If its engine computed the prompt, the time for
        the prompt alone is not known."""
        if not self._answered:
            self._answered = True
            self._computes.speeds.withdrawn(self._believed, monotonic())
            self._done()
        self.first_token()
        self.counted(None, 0)

    def counted(self, cached: int | None, prompt: int) -> None:
        """The engine that computed the prompt has reported how much of it was cached.

        Arguments:
            cached: tokens; None where it reports none.
            prompt: tokens of the prompt, as the engine has counted them; 0 where it reports none.
        """
        if self._settled:
            return
        self._settled = True
        if not self._chain.hashes:
            return
        if prompt > self._most:
            self._index.correct(self._computes.url, self._chain, 0, 0)  # the index counts it as refused
        elif cached is not None and prompt:
            computes, own = self._computes, self._prompt
            # Estimated tokens are converted to the engine's count of the same prompt.
            expected = (own - self._believed) * prompt // own if own else 0
            self._counts.note(computes.role, computes.url, expected, min(cached, prompt))
            self._index.correct(self._name, self._chain, cached, prompt)
        else:
            self._index.settle(self._name, self._chain)

    def goes_to(self, other: Backend, rank: int | None = None) -> None:
        """The hand-off is sent to another backend, and there to one of its ranks."""
        if self._decode is not None and self._chain.hashes:
            self._index.withdraw(self._decode_name, self._chain)
            self._decode_name = self._name_of(other, rank)
            self._index.enter(self._decode_name, self._chain, monotonic())
        self._decode = other

    def runs_on(self) -> None:
        """The prefill leg continues without its request, until `over`: it is still work for its engine."""
        self._runs_on = True

    def over(self) -> None:
        """The leg that computes the prompt has ended, well or not."""
        backend, chain = self._computes, self._chain
        if not self._answered:
            self._answered = True
            backend.speeds.withdrawn(self._believed, monotonic())
            self._done()
            if chain.hashes and not self._settled:
                self._index.withdraw(self._name, chain)
        elif chain.hashes and not self._settled:
            self._index.settle(self._name, chain)
        self._settled = True

    def _name_of(self, backend: Backend, rank: int | None) -> str:
        """The backend's name in the index."""
        return backend.url if rank is None or not self._ranked else backend.rank_names[rank]

    def _answer(self, computed: int, prompt: int) -> None:
        self._answered = True
        backend = self._computes
        backend.speeds.answered(self._believed, computed, prompt, monotonic())
        self._done()

    def _done(self) -> None:
        """The prompt is no longer work for its engine."""
        if self._work is not None:
            self._work[self._rank] -= self._believed
        self._publish()

    def _publish(self) -> None:
        """Write the tokens that are still to be prefilled into the load table."""
        backend = self._computes
        if backend.on_uncached_changed is not None:
            backend.on_uncached_changed(backend.speeds.outstanding, backend.speeds.since)

    def __enter__(self) -> Sent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._runs_on:
            self.over()
        if self._decode is not None and self._chain.hashes:
            self._index.withdraw(self._decode_name, self._chain)


class Prompts:
    """Prompts, and the engines that have them in their caches.

    Arguments:
        index: what engines are believed to have.
        key: the key of the chains' hashes, which the workers of a gateway share.
    Attributes:
        counts: prompt tokens that were expected in caches, and those that were found there.
        events: the KV events of engines that publish them.
        ranked: the engines with several data-parallel ranks, by the names of their ranks and by URL. In the index each
            rank is an engine of its own. The engine itself is one more, for requests whose legs cannot name a rank.
    """

    def __init__(self, index: PrefixIndex, key: bytes) -> None:
        self.index = index
        self._key = key
        self.counts = PrefixCounts()
        self.events: KvEvents | None = None
        self.ranked: dict[str, Backend] = {}
        self._rank_names: dict[str, tuple[str, ...]] = {}  # by URL
        self._earlier = EarlierChains()

    def cached(self, request: Request) -> Mapping[str, int]:
        """Tokens of a request's prompt that engines and ranks are believed to have, by their names in the index."""
        chain = request.chain
        if chain is None:
            chain = request.chain = self._chain(request)
            if self.events is not None:
                self.events.sent(chain, request.body.members)
        return self.index.cached(chain)

    def _chain(self, request: Request) -> Chain:
        body = request.body
        if body.prompt_tokens < _SHORTEST:
            return EMPTY
        if not body.follows:
            return chain_of(body, self._key)
        return chain_of(body, self._key, self._earlier.find(body.follows))

    def sent(self, request: Request, ask: Ask, computes: Lease, decode: Lease | None) -> Sent:
        """A try of a request sends its prompt to an engine.

        Arguments:
            ask: what the try was placed by.
            computes: the lease on the backend that computes the prompt.
            decode: the lease on the backend that gets the hand-off; None where `computes` does both.
        """
        backend, prompt, most = computes.backend, ask.prompt_tokens, MOST_TOKENS
        believed = ask.uncached(backend.url)
        if not request.body.media and not request.body.follows:  # otherwise the prompt is longer than its bytes show
            most = _MOST_TOKENS * prompt + _TEMPLATE
        other, rank = (None, None) if decode is None else (decode.backend, decode.rank)
        return Sent(
            self.index,
            request.chain or EMPTY,
            prompt,
            backend,
            other,
            believed,
            self.counts,
            most,
            computes.rank,
            rank,
            ranked=LAYOUTS[request.body.endpoint].ranked,
        )

    def ended(self, request: Request) -> None:
        """A request has ended, well or not. The answer of its engine may have the ids of the prompt."""
        if self.events is not None and request.chain is not None and request.transcript is not None:
            self.events.reported(request.chain, request.body.members, request.transcript.prompt)

    def stored(self, response_id: str, request: Request) -> None:
        """An engine has stored a response, which later requests may continue."""
        if request.chain is not None and request.chain.hashes:
            self._earlier.keep(response_id, request.chain)

    # What the fleet reports

    def learnt(self, backend: Backend, cache: Cache) -> None:
        """An engine has reported the size of its KV cache, and whether it caches prefixes."""
        url, names, caching = backend.url, backend.rank_names, cache.caching is not False
        self.index.join(url, cache.tokens, caching)
        if names != self._rank_names.get(url, ()):
            self._forget_ranks(url)
            if names:
                self._rank_names[url] = names
                self.ranked.update(dict.fromkeys((url, *names), backend))
        for name in names:
            self.index.join(name, cache.tokens // cache.caches, caching)

    def lost(self, backend: Backend) -> None:
        """An engine's prefix cache is empty."""
        self.index.clear(backend.url)
        for name in self._rank_names.get(backend.url, ()):
            self.index.clear(name)
        if self.events is not None:
            self.events.lost(backend)

    def forget(self, backend: Backend) -> None:
        """A backend has left the fleet."""
        self.index.leave(backend.url)
        self._forget_ranks(backend.url)
        self.counts.forget(backend.url)

    def _forget_ranks(self, url: str) -> None:
        for name in self._rank_names.pop(url, ()):
            self.index.leave(name)
            del self.ranked[name]
        self.ranked.pop(url, None)
