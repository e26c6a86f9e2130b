"""KV events as a second source of the prefix index: which publishers are followed, and which token ids are learnt.

Each worker of a gateway follows all publishers of the fleet: engines publish to any number of subscribers.

Events name blocks of token ids. For a prompt of text they are of use only if its token ids are known. Engines report
them (`return_token_ids`, which the gateway asks for so that streams can be resumed). If the settings name a tokenizer,
the gateway also encodes the prompts of completions with it, in a thread and after they were sent, so that no request
waits for it. The ids of chats are known only if they are reported, since they depend on the model's template.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from pd_proxy.decoding import UNDECODABLE, json_decoder
from pd_proxy.fleet.backend import Backend
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.fleet.zmq.kv_follower import Follower, Turns
from pd_proxy.fleet.zmq.listener import CannotListen, library
from pd_proxy.prefix.chain import Chain
from pd_proxy.prefix.corrections import Corrections, Index
from pd_proxy.prefix.engine_cache import EngineCache
from pd_proxy.prefix.index import rank_name
from pd_proxy.settings.tree import Settings

log = logging.getLogger("pd_proxy.fleet")

_LOOK = 1.0  # seconds between two looks at the backends of the fleet
_AGAIN = 5.0  # seconds until a publisher is followed again after an error of the gateway's own
_MOST_LESSONS = 256  # prompts that wait to be learnt from; further ones are skipped
_LONGEST_TEXT = 1 << 18  # bytes of the longest prompt that the tokenizer encodes
_CALM = 30.0  # seconds between two equal log lines about one engine

Members = Mapping[str, msgspec.Raw]

_read_ids = json_decoder(list[int])
_read_text = json_decoder(str)
_read_flag = json_decoder(bool)


class Lesson(NamedTuple):
    """A prompt of text whose token ids are known, or can be computed.

    Attributes:
        ids: as engines report them, `1,2,3`; None if `text` is to be encoded.
        text: a JSON string.
        special: whether the tokenizer adds its special tokens.
    """

    chain: Chain
    model: str
    cache_salt: str
    ids: bytes | None
    text: msgspec.Raw | None = None
    special: bool = True


class _Followed(NamedTuple):
    """One publisher: a data-parallel rank of an engine that has `ranks` of them."""

    url: str
    rank: int
    ranks: int

    @property
    def name(self) -> str:
        """Its name in the index."""
        return self.url if self.ranks == 1 else rank_name(self.url, self.rank)


class KvEvents:
    """The KV events of a fleet.

    Arguments:
        key: of the hashes, as for `chain_of`.
        clock: a monotonic clock, in seconds.
    Attributes:
        wanted: the settings name an endpoint for the events of some group.
        batches: the number of batches by outcome: `batch`, `replayed`, `gap`, `lost`, `restart`, `garbage`,
            `unanswered`, `failed`.
        events: the number of blocks and events by outcome (`EngineCache`), and that of prompts: `learnt`, `untold`
            (skipped, since too many were waiting), `unlearnt` (the ids are not valid).
    """

    def __init__(
        self, settings: Settings, fleet: Fleet, index: Index, key: bytes, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._fleet = fleet
        self._key = key
        self._clock = clock
        self._groups = {group.name: group.kv_events for group in settings.all_groups() if group.kv_events.endpoint}
        self._locations = {location.backend: location for location in settings.locations}
        self._tokenizer_path = settings.tokenizer
        self._tokenizer: Any = None
        self._context: Any = None
        self._turns = Turns()
        self._tasks: list[asyncio.Task[None]] = []
        self._followed: dict[_Followed, asyncio.Task[None]] = {}
        self._followers: dict[_Followed, Follower] = {}
        self._lessons: deque[Lesson] = deque()
        self._taught = asyncio.Event()
        self._to_restore: set[str] = set()
        self._said: dict[tuple[str, str], float] = {}
        self.wanted = bool(self._groups)
        self.corrections = Corrections(index, key)
        self.batches: Counter[str] = Counter()
        self.events: Counter[str] = Counter()

    def start(self) -> None:
        """Follow the publishers from now on, if that is wanted. It does nothing if called again.

        Raises:
            CannotListen: pyzmq or the tokenizer is missing.
        """
        if not self.wanted or self._tasks:
            return
        library("kv_events.endpoint is set")
        if self._tokenizer_path:
            self._tokenizer = load_tokenizer(self._tokenizer_path)
        self._context = importlib.import_module("zmq.asyncio").Context(io_threads=1)
        self._tasks = [
            asyncio.create_task(self._keep_up(), name="follow KV events"),
            asyncio.create_task(self._learn(), name="learn token ids"),
        ]

    async def close(self) -> None:
        """Stop following."""
        tasks = [*self._tasks, *self._followed.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []
        self._followed.clear()
        self._followers.clear()
        if self._context is not None:
            self._context.destroy(linger=0)
            self._context = None

    @property
    def connected(self) -> int:
        """The number of publishers that are connected now."""
        return sum(follower.connected for follower in self._followers.values())

    def lost(self, backend: Backend) -> None:
        """Note that an engine's entries were dropped from the index, since it may be another process by now. Those that
        it still has, according to its events, are entered again."""
        self._to_restore.update(one.name for one in self._followed if one.url == backend.url)

    # What is learnt from requests

    def sent(self, chain: Chain, members: Members) -> None:
        """Note that a request is about to be placed.

        Arguments:
            members: of its body.
        """
        if chain.exact:
            if not self.corrections.ids_wanted:
                self._pass_ids_on()
        elif self._tokenizer is not None and (prompt := members.get("prompt")) is not None:
            view = memoryview(prompt)
            if len(view) <= _LONGEST_TEXT and bytes(view[:1]) == b'"':
                special = bytes(members.get("add_special_tokens", b"true")) != b"false"
                self._teach(chain, members, None, prompt, special)

    def reported(self, chain: Chain, members: Members, ids: bytes) -> None:
        """Note the token ids of a prompt that an engine has reported, such as `1,2,3`."""
        if ids:
            self._teach(chain, members, ids)

    def _teach(
        self,
        chain: Chain,
        members: Members,
        ids: bytes | None,
        text: msgspec.Raw | None = None,
        special: bool = True,
    ) -> None:
        if self.corrections.knows(chain):
            return
        if len(self._lessons) >= _MOST_LESSONS:
            self.events["untold"] += 1
            return
        try:
            model, salt = (_read_text(members.get(name, b'""')) for name in ("model", "cache_salt"))
        except UNDECODABLE:
            return  # they are no strings: null, or a value that the engine refuses
        self._lessons.append(Lesson(chain, model, salt, ids, text, special))
        self._taught.set()

    def _pass_ids_on(self) -> None:
        task = asyncio.create_task(self._turns.take(self.corrections.want_ids()), name="pass token ids on")
        self.corrections.ids_wanted = True
        self._tasks.append(task)

    async def _learn(self) -> None:
        """Learn from the waiting prompts, one after the other."""
        while True:
            while self._lessons:
                lesson = self._lessons.popleft()
                try:
                    if self.corrections.knows(lesson.chain):
                        continue
                    if lesson.ids is None:
                        ids = await self._tokenized(lesson)
                    else:
                        ids = _read_ids(b"[%b]" % lesson.ids)
                    async with self._turns.turn():
                        self.corrections.learn(lesson.chain, ids, lesson.model, lesson.cache_salt)
                except UNDECODABLE:
                    self.events["unlearnt"] += 1
                except Exception:  # of one prompt, or of a tokenizer that does not work
                    self.events["unlearnt"] += 1
                    self._say(
                        "tokenizer", "learn", logging.ERROR, "the ids of a prompt could not be learnt", trace=True
                    )
                else:
                    self.events["learnt"] += 1
            self._taught.clear()
            await self._taught.wait()

    async def _tokenized(self, lesson: Lesson) -> list[int]:
        """The token ids of a prompt's text. All calls together take at most half of a core."""
        text, began = _read_text(lesson.text or b""), monotonic()
        # Of the library's functions that encode, this one releases the lock of the interpreter.
        encode = partial(self._tokenizer.encode_batch_fast, [text], add_special_tokens=lesson.special)
        (encoded,) = await asyncio.to_thread(encode)
        await asyncio.sleep(monotonic() - began)
        ids: list[int] = encoded.ids
        return ids

    # Which publishers are followed

    async def _keep_up(self) -> None:
        """Follow the publishers of the backends that are in the fleet. An engine is not followed before it has reported
        its models, since its cache depends on them."""
        while True:
            try:
                self._look()
                await self._restore()
            except Exception:
                self.batches["failed"] += 1
                self._say("", "look", logging.ERROR, "looking for publishers of KV events failed", trace=True)
            await asyncio.sleep(_LOOK)

    def _look(self) -> None:
        """Begin to follow new publishers, and stop following those whose backend has left."""
        wanted = {
            _Followed(backend.url, rank, ranks): backend
            for backend in self._fleet
            if backend.role != "encode" and backend.group in self._groups and backend.models is not None
            for ranks in (max(1, backend.coordinates.dp),)
            for rank in range(ranks)
        }
        # An engine that is out of the rotation for a while has no models; it is followed further.
        present = {backend.url: max(1, backend.coordinates.dp) for backend in self._fleet}
        for one in [one for one in self._followed if present.get(one.url) != one.ranks]:
            self._unfollow(one)
        for one, backend in wanted.items():
            if one not in self._followed:
                self._follow(one, backend)

    async def _restore(self) -> None:
        """Enter what engines have in the index, where the index has just come to know the engine or has dropped its
        entries. An engine that is out of the rotation may have restarted, so its entries wait until its publisher is
        connected again, and missing batches have been requested."""
        for one, follower in list(self._followers.items()):
            name = one.name
            if name in self._to_restore and follower.settled and self.corrections.joined(name):
                self._to_restore.discard(name)
                await self._turns.take(self.corrections.restore(name))

    def _follow(self, one: _Followed, backend: Backend) -> None:
        held = self.corrections.join(one.name)
        if not self.corrections.joined(one.name):
            self._to_restore.add(one.name)
        cache = EngineCache(
            held, partial(model_of, backend), self._key, self.events, partial(self._complain, f"{backend.url}")
        )
        events, replay = self._endpoints(one, backend)
        topic = self._groups[backend.group].topic
        follower = Follower(
            self._context, backend.url, events, replay, topic, cache, self._turns, self.batches, self._clock
        )
        self._followers[one] = follower
        self._followed[one] = asyncio.create_task(self._stay(follower, cache), name=f"follow {events}")

    def _unfollow(self, one: _Followed) -> None:
        self._followed.pop(one).cancel()
        self._followers.pop(one, None)
        self.corrections.leave(one.name)
        self._to_restore.discard(one.name)

    async def _stay(self, follower: Follower, cache: EngineCache) -> None:
        """Follow one publisher, also after an error of the gateway's own."""
        while True:
            try:
                await follower.run()
            except Exception:
                self.batches["failed"] += 1
                log.exception("following a publisher of KV events failed; it is followed again")
                cache.clear()
                await asyncio.sleep(_AGAIN)

    def _endpoints(self, one: _Followed, backend: Backend) -> tuple[str, str]:
        """The endpoints of a publisher: for events, and for replay."""
        group, location = self._groups[backend.group], self._locations.get(backend.url)
        host = urlsplit(backend.url).hostname or ""
        ports = (location.kv_events_port, location.kv_replay_port) if location is not None else (0, 0)
        events, replay = (
            _endpoint(template, host, port, one.rank)
            for template, port in zip((group.endpoint, group.replay), ports, strict=True)
        )
        return events, replay

    # Log lines

    def _complain(self, name: str, what: str, why: str) -> None:
        self._say(name, what, logging.WARNING, f"{name} publishes KV events that are ignored: {why}")

    def _say(self, name: str, what: str, level: int, text: str, *, trace: bool = False) -> None:
        """Log a line that an engine could cause again and again."""
        now = self._clock()
        if now >= self._said.get((name, what), float("-inf")):
            self._said[name, what] = now + _CALM
            log.log(level, "%s", text, exc_info=trace)


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer from its `tokenizer.json`.

    Raises:
        CannotListen: the extra is not installed, or the file is not a tokenizer.
    """
    try:
        library_ = importlib.import_module("tokenizers")
    except ImportError:
        raise CannotListen(
            "tokenizer is set, and tokenizers is not installed: pip install pd-proxy[tokenizers]"
        ) from None
    try:
        return library_.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
        raise CannotListen(f"tokenizer: {path} cannot be used: {error}") from None


def model_of(backend: Backend, adapter: str | None) -> str | None:
    """The name that clients use for an engine's base model, or for an adapter of it; None if it is not known. If the
    base model has several names, it is the first."""
    if adapter is not None:
        return adapter
    return next((name for name, card in (backend.models or {}).items() if not card.get("parent")), None)


def _endpoint(template: str, host: str, port: int, rank: int) -> str:
    """The endpoint of one rank of an engine.

    Arguments:
        template: that of its group; empty if there is no endpoint.
        port: the engine's own port of rank 0; 0 for the template's.
    """
    if not template:
        return ""
    start, _, usual = template.replace("{host}", f"[{host}]" if ":" in host else host).rpartition(":")
    return f"{start}:{(port or int(usual)) + rank}"
