"""Which backend has which stored response: engines keep their answers, and only the one that answered can be asked.

The gateway names each response, and the name says where it is: behind what makes it unique stands a hash, under a key
that no client knows, of that, of the backend's URL and of the client's name. So nothing is remembered, and nothing
forgotten: a gateway with the key finds the backend by trying all that there are. For another client than its own a
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
        key: the secret of all gateways that are to find each other's.
    """

    def __init__(self, key: bytes) -> None:
        self._key = hashlib.sha256(key).digest()

    def name(self, unique: str, url: str, client: str) -> str:
        """What a response is called, less its prefix.

        Arguments:
            unique: 32 hexadecimal digits.
            url: of the backend that has it.
            client: whose it is.
        """
        return unique + self._tag(unique, url, client)

    def holder(self, response_id: str, client: str, urls: Iterable[str]) -> str:
        """Which of these backends has a response of `client`'s; empty where none has."""
        found = _NAME(response_id)
        if found is None:
            return ""
        unique, tag = found.groups()
        return next((url for url in urls if hmac.compare_digest(self._tag(unique, url, client), tag)), "")

    def _tag(self, unique: str, url: str, client: str) -> str:
        said = f"{unique}\0{url}\0{client}".encode()
        return hashlib.blake2b(said, key=self._key, digest_size=_TAG).hexdigest()
