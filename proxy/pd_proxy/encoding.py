"""Encodes JSON: the only encoder of the gateway, and values that bodies and answers often contain.

The counterpart of `decoding.py`; every package may import both.
"""

from __future__ import annotations

import msgspec

encode_json = msgspec.json.Encoder().encode
"""Encode a value as JSON without whitespace. Members that are `msgspec.Raw` are written unchanged."""

NULL = msgspec.Raw(b"null")
TRUE = msgspec.Raw(b"true")
FALSE = msgspec.Raw(b"false")
EMPTY_LIST = msgspec.Raw(b"[]")
ABSENT = msgspec.Raw()
"""The default of a member that is kept as raw bytes: the member is absent. Falsy as a `memoryview`."""
