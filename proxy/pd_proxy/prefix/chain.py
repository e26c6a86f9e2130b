"""The prompt of a request as a chain of hashes. Each hash covers the prompt from its start to the end of one block.

Engines look up a prompt in their prefix cache by hashes of its token ids, block by block. The gateway has no tokenizer.
But two prompts whose bytes begin alike have tokens that begin alike, so it hashes the bytes of the JSON, in the order
in which a chat template writes them: tools, system, messages. All else that shapes the prompt or the engine's own
hashes (model, adapter, `cache_salt`, template arguments, media) is hashed first, into the root, and so is part of every
hash. An adapter is named as a model.

The hash is Python's hash of bytes, which is SipHash with 64 bits and the fastest one available, at 4 GB/s. It depends
on a secret of the process that forked workers share. `PYTHONHASHSEED` may reveal that secret, and engines' operators do
set it. So each hash also covers a key that no client knows. A client that could make two prompts collide could make the
gateway believe that an engine has a prompt which it does not have.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable
from hashlib import blake2b
from struct import Struct

import msgspec

from pd_proxy.encoding import NULL, encode_json
from pd_proxy.prefix.blocks import IDS, TEXT, Blocks
from pd_proxy.requests.body import Body
from pd_proxy.requests.endpoints import Endpoint, Members

_NAMING = (
    *("model", "cache_salt", "lora_path", "extra_key", "truncation", "truncate_prompt_tokens", "features"),
    *("mm_processor_kwargs", "media_io_kwargs", "multi_modal_data"),
    *("image_data", "video_data", "audio_data", "modalities"),
)
"""Members that are part of an engine's block hashes, or that truncate or extend a prompt of ids too, in vLLM 0.32 and
SGLang 0.5.23. Prompts that differ in one of them share no block."""

_TEMPLATE = (
    *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "add_special_tokens"),
    *("documents", "reasoning_effort", "reasoning", "thinking", "prompt_embeds", "previous_input_messages"),
)
"""Members that shape the whole prompt where a template writes it. Prompts that differ in one of them share no block."""

_CHOICE = "tool_choice"
_USUAL_CHOICES = (b'"auto"', b'"required"')
"""Values of `tool_choice` that do not change the prompt. `none` may leave the tools out, and some templates write the
name of a chosen tool."""

_IN_IDS = frozenset(_NAMING)
_IN_TEXT = frozenset((*_NAMING, *_TEMPLATE, _CHOICE))
_FIRST = TEXT.ends[0]
_MODEL = frozenset({"model"})
_BLANKS = b" \t\r\n"
_MAX_BLANKS = 1024


class Chain(msgspec.Struct, frozen=True, gc=False):
    """The chain of one prompt.

    Attributes:
        hashes: a hash for each whole block, of the prompt from its start to the block's end; 64 bits, signed.
        tokens: the tokens of the prompt: `Body.prompt_tokens`, an estimate; or exact where the prompt came as ids.
        units: the bytes of the prompt's text, or the number of its ids.
        scale: tokens per unit.
        blocks: the layout of the blocks, in units.
        exact: whether a unit is a token.
        root: the hash that all others begin from. A chain can continue an earlier one only where both have the same.
    """

    hashes: tuple[int, ...]
    tokens: int
    units: int
    scale: float
    blocks: Blocks = TEXT
    exact: bool = False
    root: int = 0

    @property
    def block_tokens(self) -> float:
        """The tokens in the first block; later blocks have more (`blocks.py`)."""
        return self.blocks.sizes[0] * self.scale

    def tokens_of(self, count: int) -> int:
        """The tokens in the first `count` blocks."""
        return int(self.blocks.ends[count - 1] * self.scale) if count else 0


EMPTY = Chain(hashes=(), tokens=0, units=0, scale=1.0)
"""The chain of a request without a prompt that could be looked up."""


def chain_of(body: Body, key: bytes, earlier: Chain | None = None) -> Chain:
    """The chain of a request's prompt. The cost is that of hashing its bytes, whatever they contain.

    The first prompt of a batch shares its blocks with the same prompt in a request of its own. The others share theirs
    only with the same batch.

    Arguments:
        key: the key of the hashes: 16 bytes that no client knows, the same in all workers of a gateway.
        earlier: the chain of the response that the request continues (`Body.follows`), where it is known.
    """
    members = body.members
    for name in _MAINS[body.endpoint]:
        raw = members.get(name)
        if raw is not None and raw != NULL:
            break
    else:
        return EMPTY
    if name in _MAYBE_IDS and (inside := _inside_of_ids(raw)) is not None:
        return _chain_of_ids(inside, _root(members, _IN_IDS, b"ids", key), key)
    before = _before(members)
    said = _opened(raw, batch=name == "prompt" or name == "text")
    if len(said) < _FIRST and not before and name != "input":
        return Chain((), body.prompt_tokens, len(said), 1.0)
    root = _root(members, _IN_TEXT, b"text", key)
    if name == "input":
        return _chain_of_response(body, before, said, root, key, earlier)
    return _chain_of_text(body, before, said, root, key)


def chain_of_ids(ids: Iterable[int], root: int, key: bytes) -> Chain:
    """The chain of a prompt of token ids.

    Arguments:
        ids: numbers of at most 32 bits.
        root: as `root_of_ids` returns it.
        key: as for `chain_of`.
    Raises:
        OverflowError: an id has more than 32 bits, or is negative.
    """
    return _chain_of_ids(_written(ids)[:-1], root, key)


def root_of_ids(model: str, key: bytes, cache_salt: str = "") -> int:
    """The root of the chain of a prompt of ids: the same as `chain_of` computes for a request with only these
    members."""
    members: Members = {"model": msgspec.Raw(encode_json(model))}
    if cache_salt:
        members["cache_salt"] = msgspec.Raw(encode_json(cache_salt))
    return _root(members, _IN_IDS, b"ids", key)


def link_ids(previous: int, ids: Iterable[int], key: bytes) -> int:
    """The hash at the end of a block of token ids.

    Arguments:
        previous: the hash at the end of the block before, or `root_of_ids`.
        ids: all ids of the block, as many as `blocks.IDS` says.
    Raises:
        OverflowError: an id has more than 32 bits, or is negative.
    """
    return _link(previous, _written(ids), key)


def _written(ids: Iterable[int]) -> bytes:
    """Token ids in decimal, each with a comma behind it."""
    return "".join(f"{one}," for one in array("I", ids)).encode()


def _link(previous: int, block: bytes, key: bytes) -> int:
    """The hash of a block and of all blocks before it."""
    return hash(key + _pack(previous) + block)


_pack = Struct("<q").pack


_MAINS: dict[Endpoint, tuple[str, ...]] = {
    "chat": ("messages",),
    "completions": ("prompt",),
    "messages": ("messages",),
    "responses": ("input",),
    "generate": ("token_ids",),
    "sglang_generate": ("text", "input_ids", "input_embeds"),
}
"""The member that is the prompt. Of several the first that is present counts, as in the engine."""
_MAYBE_IDS = frozenset({"prompt", "token_ids", "input_ids"})


def _root(members: Members, shaping: frozenset[str], kind: bytes, key: bytes) -> int:
    """The root of a chain: a hash of the members that shape the whole prompt."""
    found = shaping.intersection(members)
    if found == _MODEL:
        return hash(b"%b\0%b\0model\0%b" % (key, kind, bytes(members["model"])))  # as below
    parts = [key, kind]
    for name in sorted(found):
        value = members[name]
        if value == NULL or (name == _CHOICE and bytes(value) in _USUAL_CHOICES):
            continue
        parts += name.encode(), bytes(value)
    return hash(b"\0".join(parts))  # JSON contains no zero byte


def _before(members: Members) -> list[bytes | msgspec.Raw]:
    """The members that a template writes before the messages. In front of each is a byte that no JSON value begins
    with."""
    parts: list[bytes | msgspec.Raw] = []
    if _NAMED_BEFORE.isdisjoint(members):
        return parts
    for name, mark in _BEFORE:
        if (part := members.get(name)) is not None:
            parts += mark, part
    if parts:
        parts.append(b"\3")
    return parts


_BEFORE = (("tools", b"\1"), ("system", b"\2"), ("instructions", b"\2"))
_NAMED_BEFORE = frozenset(name for name, _ in _BEFORE)


def _opened(raw: msgspec.Raw, batch: bool) -> memoryview:
    """A prompt's JSON without the character that closes it, so that a longer prompt has the same bytes that far; and
    without the opening bracket of a batch of texts. Whitespace beside them is removed too, up to `_MAX_BLANKS`
    bytes."""
    view = memoryview(raw)
    start, end = 0, len(view)
    if end and view[end - 1] in b'"]}':
        tail = bytes(view[max(0, end - 1 - _MAX_BLANKS) : end - 1])
        end -= 1 + len(tail) - len(tail.rstrip(_BLANKS))
    if batch and bytes(view[:1]) == b"[":
        head = bytes(view[1 : min(end, 1 + _MAX_BLANKS)])
        start = 1 + len(head) - len(head.lstrip(_BLANKS))
    return view[start:end]


def _chain_of_text(
    body: Body, before: list[bytes | msgspec.Raw], said: bytes | memoryview, root: int, key: bytes
) -> Chain:
    if before:
        said = b"".join((*before, said))
    if body.media:
        said = _without_media(bytes(said), key)
    units = len(said)
    return Chain(
        hashes=_hash_text(said, root, 0, 0, key),
        tokens=body.prompt_tokens,
        units=units,
        scale=body.prompt_tokens / units if units else 1.0,
    )


def _hash_text(said: bytes | memoryview, previous: int, first: int, start: int, key: bytes) -> tuple[int, ...]:
    """The hashes of the whole blocks that end in a text.

    Arguments:
        previous: the hash of all that is before the text.
        first: how many blocks end before the text.
        start: the units before the text.
    """
    hashes = []
    at = 0
    for end in TEXT.ends[first : TEXT.whole(start + len(said))]:
        end -= start
        previous = hash(key + _pack(previous) + said[at:end])  # `_link`, without the cost of a call
        hashes.append(previous)
        at = end
    return tuple(hashes)


def _chain_of_response(
    body: Body,
    before: list[bytes | msgspec.Raw],
    said: memoryview,
    root: int,
    key: bytes,
    earlier: Chain | None,
) -> Chain:
    """The chain of a request to OpenAI's Responses API.

    The text between the earlier prompt and the new input is the engine's answer and perhaps more, which the gateway
    does not know. The id of the response is hashed in its place. So two requests share blocks beyond the earlier prompt
    only if they continue the same response.
    """
    under = _link(root, b"".join(before), key)
    follows = body.follows.encode()
    if not follows:
        return msgspec.structs.replace(_chain_of_text(body, before, said, root, key), root=under)
    if earlier is None or earlier.root != under:
        return msgspec.structs.replace(_chain_of_text(body, before, said, _link(root, follows, key), key), root=under)
    text: bytes | memoryview = _without_media(bytes(said), key) if body.media else said
    last = earlier.hashes[-1] if earlier.hashes else earlier.root
    units, tokens = earlier.units + len(text), earlier.tokens + body.prompt_tokens
    return Chain(
        hashes=earlier.hashes + _hash_text(text, _link(last, follows, key), len(earlier.hashes), earlier.units, key),
        tokens=tokens,
        units=units,
        scale=tokens / units if units else 1.0,
        root=under,
    )


_MEDIUM = b";base64,"
_MAX_MEDIA = 1024
_SHORT_MEDIUM = 4096  # bytes; a shorter medium stays in the text
_MEDIUM_UNITS = 4000  # bytes that replace a medium: as much text as `Body.prompt_tokens` counts for one
_MEDIUM_DIGEST = 16


def _without_media(said: bytes, key: bytes) -> bytes:
    """Replace each long medium in a text by its digest, since an image of a megabyte is no more of the prompt than some
    pages of text."""
    parts: list[bytes | memoryview] = []
    view = memoryview(said)
    at = place = 0
    for _ in range(_MAX_MEDIA):
        place = said.find(_MEDIUM, place)
        if place < 0:
            break
        place += len(_MEDIUM)
        end = said.find(b'"', place)
        if end < 0:
            break
        if end - place >= _SHORT_MEDIUM:
            digest = blake2b(view[place:end], key=key, digest_size=_MEDIUM_DIGEST).digest()
            parts += view[at:place], digest * (_MEDIUM_UNITS // _MEDIUM_DIGEST)
            at = end
        place = end
    return b"".join((*parts, view[at:])) if parts else said


_MAX_ID_BYTES = 4 * 1024 * 1024  # bytes of a list of ids that are hashed: more than half a million ids
_NEAR = 2048  # ids at the start of a prompt, where the index has an engine's own blocks
_OWN = 16  # ids of each of these blocks
_OWN_BLOCK = re.compile(rb"[^,]*+," * _OWN)
_SAMPLE = 256  # bytes from which the mean length of a number is estimated


def _inside_of_ids(raw: msgspec.Raw) -> bytes | None:
    """The text between the brackets of a list of numbers, or of a list of one such list, without whitespace; None where
    the value is neither. Of a long list it is only the beginning. Some lists that an engine would refuse are
    accepted."""
    said = bytes(memoryview(raw)[:_MAX_ID_BYTES])
    if len(said) == _MAX_ID_BYTES:
        said = said[: said.rfind(b",") + 1]
    start = said[:64].lstrip(b"[" + _BLANKS)
    depth = said[:64].count(b"[")
    if not start[:1].isdigit() or not 1 <= depth <= 2 or said.find(b"[", 64) >= 0:
        return None
    inside = said.strip(b"[]," + _BLANKS)
    if any(inside.find(blank) >= 0 for blank in (b" ", b"\n", b"\t", b"\r")):
        inside = inside.translate(None, _BLANKS)
    return inside


def _chain_of_ids(inside: bytes, root: int, key: bytes) -> Chain:
    """The chain of a prompt of ids, which are decimal with commas between. Numbers are counted by their commas, since
    to parse them takes three times as long."""
    said = inside + b","
    mean = _SAMPLE / max(1, said.count(b",", 0, _SAMPLE))
    near = _after(said, 0, _NEAR, mean) if len(said) > 2 * _NEAR else -1
    hashes, previous = [], root
    for block in _OWN_BLOCK.findall(said, 0, len(said) if near < 0 else near):
        previous = hash(key + _pack(previous) + block)
        hashes.append(previous)
    if near < 0:
        count = said.count(b",")
    else:
        at, count = near, _NEAR
        for size in IDS.sizes[_NEAR // _OWN :]:
            end = _after(said, at, size, mean)
            if end < 0:
                break
            previous = hash(key + _pack(previous) + said[at:end])
            hashes.append(previous)
            count += size
            at, mean = end, (end - at) / size
        count += said.count(b",", at)
    return Chain(
        hashes=tuple(hashes),
        tokens=count,
        units=count,
        scale=1.0,
        blocks=IDS,
        exact=True,
        root=root,
    )


def _after(text: bytes, at: int, count: int, mean: float) -> int:
    """The index behind the last of `count` numbers that begin at `at`, and its comma; -1 where there are fewer.

    Arguments:
        mean: the bytes that a number takes on average.
    """
    place = min(len(text), at + int(count * mean))
    seen = text.count(b",", at, place)
    while seen < count:
        place = text.find(b",", place) + 1
        if not place:
            return -1
        seen += 1
    while seen >= count:
        place = text.rfind(b",", at, place)
        seen -= 1
    return place + 1
