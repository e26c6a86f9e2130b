"""Tokens: a small fixed vocabulary, a lossless tokenizer, and the model, which is a rolling hash.

Invariant: `detokenize(tokenize(text)) == text`, and the next token is a pure function of the tokens so far (and of the
salt, when sampling). So a continuation of a prompt and k tokens is the rest of the same text, in any process.

Some characters are spread over two or three tokens, as in byte-level vocabularies: the text of such a token is not
complete until the following tokens have come.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

MASK = (1 << 64) - 1

_LEXICON = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so said what up its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most
made after also did many off before must well back through years where much your way down should because long each
just state those people too little good very make world still see own work men day get here old life both between
being under three never know same last another while us might great year come since against go came right used take
place water river stone light morning window garden letter paper engine signal market harbour copper winter silver
orange quiet narrow distant gentle token block cache prefill decode gateway lease queue worker batch tensor kernel
pipeline
"""
_WORDS = _LEXICON.split()
_PUNCTUATION = [",", ".", ";", ":", "?", "!", "\n", "\n\n", " -", " (", ")", '"', " 7", " 42", "ing", "ed", "ly", "s"]
_SPLIT = [  # characters that take several tokens
    (b" \xc3", b"\xa9"),
    (b" \xc3", b"\xbc"),
    (b" na\xc3", b"\xafve"),
    (b" \xe4\xbd", b"\xa0"),
    (b" \xe6", b"\xb0", b"\xb4"),
    (b" \xf0\x9f", b"\x98\x80"),
    (b" \xf0\x9f", b"\x9a", b"\x80"),
]
_SPECIAL = ("<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|media|>")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

VOCABULARY: list[bytes] = [bytes([value]) for value in range(256)]
FOLLOWER: dict[int, int] = {}  # the token that must follow one that ends inside a character
_ids: dict[str, int] = {}


def _add(piece: str) -> int:
    if piece not in _ids:
        _ids[piece] = len(VOCABULARY)
        VOCABULARY.append(piece.encode())
    return _ids[piece]


for _first in " " + _LETTERS:
    for _second in _LETTERS:
        _add(_first + _second)
_generated = [_add(" " + word) for word in _WORDS] + [_add(piece) for piece in _PUNCTUATION]
for _word in _WORDS:
    _add(_word)
for _parts in _SPLIT:
    _chain = list(range(len(VOCABULARY), len(VOCABULARY) + len(_parts)))
    VOCABULARY.extend(_parts)
    FOLLOWER.update(itertools.pairwise(_chain))
    _generated.extend([_chain[0]] * 3)  # often enough that a short answer has one

SPECIAL: dict[str, int] = {name: len(VOCABULARY) + offset for offset, name in enumerate(_SPECIAL)}
VOCABULARY.extend(name.encode() for name in _SPECIAL)
EOS = SPECIAL["<|eos|>"]
FIRST_SPECIAL = EOS
VOCABULARY_SIZE = len(VOCABULARY)
GENERATED: tuple[int, ...] = tuple(_generated)


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


# The text of each token, or None where its bytes are not whole characters; special tokens have no text.
TEXT: list[str | None] = ["" if token >= FIRST_SPECIAL else _whole(piece) for token, piece in enumerate(VOCABULARY)]

_PIECE = re.compile(r" ?[a-z]+|[^a-z]", re.DOTALL)
_memo: dict[str, tuple[int, ...]] = {}
_MEMO_LIMIT = 65536


def _split_piece(piece: str) -> tuple[int, ...]:
    found = _ids.get(piece)
    if found is not None:
        return (found,)
    if not piece.isascii():
        return tuple(piece.encode("utf-8", "surrogatepass"))
    tokens = []
    for start in range(0, len(piece), 2):
        pair = piece[start : start + 2]
        tokens.append(_ids[pair] if len(pair) == 2 else ord(pair))
    return tuple(tokens)


def tokenize(text: str) -> list[int]:
    """The token ids of `text`. Markers of the chat template in it are plain characters."""
    tokens: list[int] = []
    extend = tokens.extend
    memo = _memo
    for piece in _PIECE.findall(text):
        known = memo.get(piece)
        if known is None:
            known = _split_piece(piece)
            if len(memo) < _MEMO_LIMIT:
                memo[piece] = known
        extend(known)
    return tokens


def detokenize(tokens: Iterable[int], *, special: bool = False) -> str:
    """The text of `tokens`; special tokens are left out unless asked for."""
    pieces = (VOCABULARY[token] for token in tokens if special or token < FIRST_SPECIAL)
    return b"".join(pieces).decode("utf-8", "replace")


def token_text(token: int) -> str:
    """The form of one token in log probabilities."""
    return VOCABULARY[token].decode("utf-8", "replace")


def start_state(weights: int) -> int:
    """The state before the first token."""
    return (weights * 0xD6E8FEB86659FD93 + 0x243F6A8885A308D3) & MASK


def advance(state: int, token: int) -> int:
    """The state after one more token."""
    return ((state ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & MASK


def boundary_states(state: int, tokens: Sequence[int], block_size: int) -> tuple[list[int], int]:
    """The state at the start (`state` itself), at the end of each full block, and after the last token."""
    boundaries = [state]
    for start in range(0, len(tokens), block_size):
        block = tokens[start : start + block_size]
        for token in block:
            state = ((state ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & MASK
        if len(block) == block_size:
            boundaries.append(state)
    return boundaries, state


def mix(value: int) -> int:
    """Spread every bit of `value` over 64 bits (the finaliser of MurmurHash3)."""
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD & MASK
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 & MASK
    return value ^ (value >> 33)


def draw(state: int, salt: int) -> int:
    """The 64 bits from which a token and its log probabilities are taken."""
    return mix((state ^ (salt * 0xA0761D6478BD642F)) & MASK)


def choose(bits: int, last: int, eos_limit: int) -> int:
    """The token that `bits` select after the token `last`; `eos_limit` in 2**24 of the values end the sequence."""
    follower = FOLLOWER.get(last)
    if follower is not None:
        return follower
    if (bits >> 40) < eos_limit:
        return EOS
    return GENERATED[bits % len(GENERATED)]


def logprob(bits: int) -> float:
    """The log probability that is reported for the chosen token."""
    return -((bits >> 20) & 0xFF) / 512


def alternatives(bits: int, token: int, count: int) -> list[tuple[int, float]]:
    """The `count` likeliest tokens with their log probabilities, the chosen one first."""
    best = logprob(bits)
    found = [(token, best)]
    index = bits % len(GENERATED)
    while len(found) < count:
        index = (index + 1) % len(GENERATED)
        if all(other != GENERATED[index] for other, _ in found):
            found.append((GENERATED[index], round(best - 0.75 * len(found), 6)))
    return found[:count]
