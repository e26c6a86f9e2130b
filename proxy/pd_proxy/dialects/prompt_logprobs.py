"""Log probabilities of a prompt, which prefill has and decode's answer lacks.

SGLang's decode engine has computed nothing of the prompt. So prefill's lists (`meta_info.input_token_logprobs` and the
like) are put in front of decode's, in a whole answer and in each event of a stream, since each event repeats
everything. The lists are neither decoded nor encoded.
"""

from __future__ import annotations

import asyncio

import msgspec

from pd_proxy.decoding import Members, Undecodable, decode_members, json_decoder
from pd_proxy.encoding import EMPTY_LIST, encode_json
from pd_proxy.errors import BackendGarbled, InvalidRequest

NAMES = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
STREAM_LIMIT = 4 * 1024 * 1024  # bytes that each event of a stream may repeat: the lists of some 100,000 tokens


class _Item(msgspec.Struct):
    meta_info: Members


_decode_items = json_decoder(_Item | list[_Item])
_decode_answers = json_decoder(list[Members] | Members)


class PromptLogprobs:
    """Prefill's log probabilities of the prompts of one try.

    Arguments:
        limit: bytes of them that may be kept.
    Attributes:
        here: done once prefill has answered.
    """

    __slots__ = ("_items", "_limit", "here")

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int | None = None) -> None:
        self.here: asyncio.Future[None] = loop.create_future()
        self._limit = limit
        self._items: list[dict[str, bytes]] = []

    def take(self, answer: bytes) -> None:
        """Take the lists from prefill's answer, which has been checked to be one.

        Raises:
            InvalidRequest: they are too long to be repeated in each event.
        """
        found = _decode_items(answer)
        for item in found if isinstance(found, list) else [found]:
            lists = {name: _inner(item.meta_info[name]) for name in NAMES if name in item.meta_info}
            self._items.append({name: inner for name, inner in lists.items() if inner})
        size = sum(len(inner) for lists in self._items for inner in lists.values())
        if self._limit is not None and size > self._limit:
            raise InvalidRequest(
                f"the prompt's log probabilities take {size} bytes, and each event would repeat them; "
                "ask for them without `stream`, or with a higher `logprob_start_len`",
                param="stream",
            )
        if not self.here.done():
            self.here.set_result(None)

    def into(self, members: Members, index: int) -> Members:
        """Put the lists into one answer, or one event.

        Arguments:
            members: of the answer. Changed in place.
            index: of its prompt.
        Raises:
            BackendGarbled: prefill had no such prompt.
        """
        try:
            if lists := self._items[index]:
                meta = decode_members(members["meta_info"])
                for name, inner in lists.items():
                    own = _inner(meta.get(name, EMPTY_LIST))
                    meta[name] = msgspec.Raw(b"[%b%b%b]" % (inner, b"," if own else b"", own))
                members["meta_info"] = msgspec.Raw(encode_json(meta))
        except (IndexError, KeyError, Undecodable):
            raise BackendGarbled("decode's answer is for other prompts than prefill's") from None
        return members

    def whole(self, answer: bytes) -> bytes:
        """A whole answer with the lists in it.

        Raises:
            BackendGarbled: it is not for the same prompts as prefill's.
        """
        try:
            found = _decode_answers(answer)
        except Undecodable as error:
            raise BackendGarbled(f"decode's answer is none: {error}") from None
        if isinstance(found, dict):
            return encode_json(self.into(found, 0))
        if len(found) != len(self._items):
            raise BackendGarbled("decode's answer is for other prompts than prefill's")
        return encode_json([self.into(members, index) for index, members in enumerate(found)])


def _inner(raw: msgspec.Raw) -> bytes:
    """The bytes between the brackets of a list; empty for null and for anything else."""
    value = bytes(raw)
    return value[1:-1].strip() if value.startswith(b"[") else b""
