"""A client's multipart form: read while it arrives, and written anew for the engine part by part.

The engine gets a form that the gateway writes: with a boundary of its own, and with a header of each part that is
written from what was read of the client's header. So an engine cannot read another field in it than the gateway has,
whatever the client sent. Fields that clients may not send to engines (`members.FORBIDDEN`) are left out, as in JSON.
The contents of parts pass unchanged. Only the few small fields that the gateway reads are held in memory as a whole.

The format is RFC 7578 as clients write it: names and filenames in quotes, and RFC 2231's `filename*` is understood.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal
from urllib.parse import unquote_to_bytes

from pd_proxy.decoding import Undecodable, decode_text
from pd_proxy.errors import InvalidRequest
from pd_proxy.requests.members import FORBIDDEN, NESTED, strip_nested

_BOUNDARY = re.compile(
    rb"multipart/form-data\s*;\s*boundary=(?:\"([0-9A-Za-z'()+_,./:=? -]{1,70})\"|([0-9A-Za-z'()+_,./:=?-]{1,70}))",
    re.IGNORECASE,
)
_PARAMETER = re.compile(rb';\s*([A-Za-z]+\*?)=(?:"((?:[^"\\\r\n]|\\.)*)"|([^\s";]+))\s*')
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.\[\]-]{0,127}")
_CONTENT_TYPE = re.compile(rb"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(?:\s*;\s*[A-Za-z0-9_-]+=[A-Za-z0-9\"._+-]+)*")
_PLAIN_ENCODINGS = (b"7bit", b"8bit", b"binary")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")

_MAX_PARTS = 128
_MAX_HEAD = 8 * 1024  # bytes of one part's header
_MAX_READ = 64 * 1024  # bytes of a field that the gateway reads


class Form:
    """Translates one form.

    Arguments:
        content_type: the content type of the client's request.
        boundary: the boundary of the form that the engine gets. It must be random, so that no content can contain it.
        wanted: the fields that the gateway reads.
        aliases: the engines' names of models by alias.
    Attributes:
        content_type: the content type of the engine's form.
        fields: the values of the fields in `wanted` that have arrived. Each may occur once.
        whole: the form has ended.
    Raises:
        InvalidRequest: the content type is not that of a form; or, from `feed` and `end`, the form is malformed.
    """

    def __init__(
        self,
        content_type: bytes,
        boundary: bytes,
        wanted: tuple[str, ...] = ("model", "stream"),
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        announced = _BOUNDARY.fullmatch(content_type.strip())
        if announced is None:
            raise InvalidRequest("the content-type must be multipart/form-data, with a boundary")
        self.content_type = b"multipart/form-data; boundary=" + boundary
        self.fields: dict[str, str] = {}
        self.whole = False
        self._seen: set[str] = set()
        self._wanted = wanted
        self._aliases = aliases or {}
        self._delimiter = b"\r\n--" + (announced[1] or announced[2])
        self._own = b"--" + boundary
        self._rest = bytearray(b"\r\n")  # the first delimiter's line break, which is not sent
        self._stage: Literal["preamble", "delimiter", "head", "content"] = "preamble"
        self._parts = 0
        self._name = ""
        self._read: bytearray | None = None  # the content of a part that the gateway reads
        self._passes = True  # whether the present part is sent to the engine

    def feed(self, data: bytes | bytearray) -> bytes:
        """Read some bytes of the client's form. Returns the bytes of the engine's form that result."""
        if self.whole:
            return b""  # an epilogue, which has no meaning
        out: list[bytes] = []
        self._rest += data
        while not self.whole and self._step(out):
            pass
        return b"".join(out)

    def end(self) -> None:
        """Check that the form is complete, since the client's body has ended."""
        if not self.whole:
            raise InvalidRequest("the form ends before its last boundary")

    def _step(self, out: list[bytes]) -> bool:
        """Read the next element of the form. Returns False where it has not arrived completely."""
        match self._stage:
            case "preamble":
                return self._preamble()
            case "delimiter":
                return self._after_delimiter(out)
            case "head":
                return self._head(out)
            case "content":
                return self._content(out)

    def _preamble(self) -> bool:
        if len(self._rest) < len(self._delimiter):
            if not self._delimiter.startswith(self._rest):
                raise InvalidRequest("the form does not begin with its boundary")
            return False
        if not self._rest.startswith(self._delimiter):
            raise InvalidRequest("the form does not begin with its boundary")
        del self._rest[: len(self._delimiter)]
        self._stage = "delimiter"
        return True

    def _after_delimiter(self, out: list[bytes]) -> bool:
        if len(self._rest) < 2:
            return False
        follows = bytes(self._rest[:2])
        if follows == b"--":
            out.append(self._own + b"--\r\n")
            self.whole = True
            self._rest.clear()
        elif follows == b"\r\n":
            del self._rest[:2]
            self._stage = "head"
            self._parts += 1
            if self._parts > _MAX_PARTS:
                raise InvalidRequest(f"the form has more than {_MAX_PARTS} parts")
        else:
            raise InvalidRequest("a boundary of the form is followed by neither a line's end nor --")
        return True

    def _head(self, out: list[bytes]) -> bool:
        end = self._rest.find(b"\r\n\r\n", 0, _MAX_HEAD)
        if end < 0:
            if len(self._rest) > _MAX_HEAD:
                raise InvalidRequest(f"a part's header in the form exceeds {_MAX_HEAD} bytes")
            return False
        head = bytes(self._rest[:end])
        del self._rest[: end + 4]
        self._begin_part(head, out)
        self._stage = "content"
        return True

    def _begin_part(self, head: bytes, out: list[bytes]) -> None:
        name, filename, content_type = _read_head(head)
        self._name = name
        self._passes = FORBIDDEN.isdisjoint(re.split(r"[.\[\]]+", name))  # `a[b]` and `a.b` may be read as member b
        self._read = None
        if name in self._wanted or name in NESTED:
            if filename is not None:
                raise InvalidRequest(f"`{name}` must not be a file", param=name)
            if name in self._seen:
                raise InvalidRequest(f"`{name}` is in the form twice", param=name)
            self._seen.add(name)
            self._read = bytearray()
        if self._passes:
            lines = [self._own, b'content-disposition: form-data; name="%b"' % name.encode("ascii")]
            if filename is not None:
                lines[1] += b'; filename="%b"' % filename
            if content_type:
                lines.append(b"content-type: " + content_type)
            out.append(b"\r\n".join(lines) + b"\r\n\r\n")

    def _content(self, out: list[bytes]) -> bool:
        found = self._rest.find(self._delimiter)
        if found >= 0:
            self._take(bytes(self._rest[:found]), out)
            del self._rest[: found + len(self._delimiter)]
            self._end_part(out)
            self._stage = "delimiter"
            return True
        sure = len(self._rest) - len(self._delimiter) + 1
        if sure > 0:
            self._take(bytes(self._rest[:sure]), out)
            del self._rest[:sure]
        return False

    def _take(self, content: bytes, out: list[bytes]) -> None:
        if self._read is not None:
            self._read += content
            if len(self._read) > _MAX_READ:
                raise InvalidRequest(f"`{self._name}` exceeds {_MAX_READ} bytes", param=self._name)
        elif self._passes:
            out.append(content)

    def _end_part(self, out: list[bytes]) -> None:
        if self._read is not None:
            value = bytes(self._read)
            if self._name in NESTED:
                value = bytes(strip_nested(self._name, value))
            else:
                try:
                    text = decode_text(value)
                except Undecodable:
                    raise InvalidRequest(f"`{self._name}` must be text", param=self._name) from None
                if self._name == "model" and text in self._aliases:
                    text = self._aliases[text]
                    value = text.encode()
                self.fields[self._name] = text
            out.append(value)
        if self._passes:
            out.append(b"\r\n")


def _read_head(head: bytes) -> tuple[str, bytes | None, bytes]:
    """A part's name, its filename quoted for a header (None where it is not a file), and its content type.

    Raises:
        InvalidRequest: the header is malformed or ambiguous.
    """
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        name = name.lower()
        if not colon or not re.fullmatch(rb"[a-z0-9-]+", name) or name in headers or _CONTROL.search(value):
            raise InvalidRequest("a part of the form has a header that cannot be read")
        headers[name] = value.strip()
    kind, semicolon, parameters = headers.get(b"content-disposition", b"").partition(b";")
    values = _parameters(semicolon + parameters)
    if kind.strip().lower() != b"form-data" or _NAME.fullmatch(values.get(b"name", b"")) is None:
        raise InvalidRequest("a part of the form has no name that can be read")
    if headers.get(b"content-transfer-encoding", b"binary").lower() not in _PLAIN_ENCODINGS:
        raise InvalidRequest("a part of the form has a transfer encoding; send its bytes as they are")
    content_type = headers.get(b"content-type", b"")
    if content_type and (len(content_type) > 256 or _CONTENT_TYPE.fullmatch(content_type) is None):
        raise InvalidRequest("a part of the form has a content-type that cannot be read")
    return values[b"name"].decode("latin-1"), _filename(values), content_type


def _parameters(text: bytes) -> dict[bytes, bytes]:
    """The parameters of a content-disposition."""
    values: dict[bytes, bytes] = {}
    place = 0
    while place < len(text):
        found = _PARAMETER.match(text, place)
        if found is None or found[1].lower() in values:
            raise InvalidRequest("a part of the form has a content-disposition that cannot be read")
        quoted = found[2]
        values[found[1].lower()] = found[3] if quoted is None else re.sub(rb'\\(["\\])', rb"\1", quoted)
        place = found.end()
    return values


def _filename(values: dict[bytes, bytes]) -> bytes | None:
    """A part's filename, quoted as browsers do: no character is left that could end the quotes or the line."""
    name = values.get(b"filename")
    charset, quote, extended = values.get(b"filename*", b"").partition(b"'")
    if quote and charset.lower() == b"utf-8":
        name = unquote_to_bytes(extended.partition(b"'")[2])
    elif name is None:
        return b"file" if b"filename*" in values else None
    return _CONTROL.sub(b"", name).replace(b'"', b"%22").replace(b"\\", b"%5C")[:512]
