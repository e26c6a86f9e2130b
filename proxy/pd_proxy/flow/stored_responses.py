"""Finds the backend that has a stored response: an engine keeps its own answers, and only that engine can return them.

The gateway names each response, and the backend follows from the name. After a unique part the name has a hash, with a
key that no client knows, of that part, of the backend's URL and of the client's name. So the gateway need not remember
anything: a gateway with the key finds the backend by trying every backend's URL. For another client than its own a
response does not exist.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable

_TAG = 8  # bytes: a client that guesses hits one of 50 backends once in 10^17 tries
_NAME = re.compile(r"resp_([0-9a-f]{32})([0-9a-f]{16})").fullmatch


class StoredResponses:
    """The names of stored responses.

    Arguments:
        key: the secret that all gateways have which are to find each other's responses.
    """

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.sha256(key).digest()

    def name(self, unique: str, url: str, client: str) -> str:
        """The name of a response, without its prefix.

        Arguments:
            unique: 32 hexadecimal digits.
            url: the URL of the backend that has it.
            client: the name of its client.
        """
        return unique + self._tag(unique, url, client)

    def holder(self, response_id: str, client: str, urls: Iterable[str]) -> str:
        """The URL of the backend that has a response of `client`; empty where none has."""
        found = _NAME(response_id)
        if found is None:
            return ""
        unique, tag = found.groups()
        return next((url for url in urls if hmac.compare_digest(self._tag(unique, url, client), tag)), "")

    def _tag(self, unique: str, url: str, client: str) -> str:
        said = f"{unique}\0{url}\0{client}".encode()
        return hashlib.blake2b(said, key=self._key, digest_size=_TAG).hexdigest()
