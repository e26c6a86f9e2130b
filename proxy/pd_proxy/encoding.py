"""JSON as the gateway writes it: the one encoder, and values that bodies and answers often have.

The counterpart of `decoding.py`, and like it open to every package.
"""

from __future__ import annotations

import msgspec

encode_json = msgspec.json.Encoder().encode
"""Any value as JSON, without blanks. Members that are `msgspec.Raw` stay the bytes that they are."""

NULL = msgspec.Raw(b"null")
TRUE = msgspec.Raw(b"true")
FALSE = msgspec.Raw(b"false")
EMPTY_LIST = msgspec.Raw(b"[]")
ABSENT = msgspec.Raw()
"""The default of a member that is kept as bytes: it is not there. Falsy as a `memoryview`."""
