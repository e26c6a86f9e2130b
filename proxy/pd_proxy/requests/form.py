"""A client's multipart form on its way to an engine: read as it comes, and written anew part by part.

The form an engine gets is the gateway's own: its own boundary, and of each part a header that is written from what was
understood of the client's. So the engine cannot read another field in it than was seen here, whatever the client sent,
and what no client may say to an engine (`body.FORBIDDEN`) is left out as it is of JSON. The contents of parts pass as
they are, and no part is ever held whole but for the few small fields that are read.

RFC 7578, as clients write it: names and filenames in quotes, with RFC 2231's `filename*` understood.
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

_MOST_PARTS = 128
_MOST_HEAD = 8 * 1024  # bytes of one part's header
_MOST_READ = 64 * 1024  # bytes of a field that is read here


class Form:
    """One form.

    Arguments:
        content_type: the request's.
        boundary: of the form that the engine gets; nobody can have guessed it.
        aliases: other names of models, and the engines' own.
    Attributes:
        content_type: of that form.
        fields: the values of those of `wanted` that have come; every one comes once.
        whole: the form's end has come.
    Raises:
        InvalidRequest: no form is announced; or, from `feed` and `end`, what comes is none.
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
        self._read: bytearray | None = None  # the content of a part that is read before it is sent
        self._passes = True  # this part is sent

    def feed(self, data: bytes | bytearray) -> bytes:
        """Take some bytes of the client's form; returns those for the engine that they have brought."""
        if self.whole:
            return b""  # an epilogue, which means nothing
        out: list[bytes] = []
        self._rest += data
        while not self.whole and self._step(out):
            pass
        return b"".join(out)

    def end(self) -> None:
        """The client's body has ended."""
        if not self.whole:
            raise InvalidRequest("the form ends before its last boundary")

    def _step(self, out: list[bytes]) -> bool:
        """Go on by one element of the form; whether there was enough of it."""
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
            if self._parts > _MOST_PARTS:
                raise InvalidRequest(f"the form has more than {_MOST_PARTS} parts")
        else:
            raise InvalidRequest("a boundary of the form is followed by neither a line's end nor --")
        return True

    def _head(self, out: list[bytes]) -> bool:
        end = self._rest.find(b"\r\n\r\n", 0, _MOST_HEAD)
        if end < 0:
            if len(self._rest) > _MOST_HEAD:
                raise InvalidRequest(f"a part's header in the form exceeds {_MOST_HEAD} bytes")
            return False
        head = bytes(self._rest[:end])
        del self._rest[: end + 4]
        self._begin_part(head, out)
        self._stage = "content"
        return True

    def _begin_part(self, head: bytes, out: list[bytes]) -> None:
        name, filename, content_type = _read_head(head)
        self._name = name
        self._passes = FORBIDDEN.isdisjoint(re.split(r"[.\[\]]+", name))  # some read `a[b]` and `a.b` as b of a
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
            if len(self._read) > _MOST_READ:
                raise InvalidRequest(f"`{self._name}` exceeds {_MOST_READ} bytes", param=self._name)
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
    """A part's name, its filename as it may stand in quotes (None where it is no file), and its content type.

    Raises:
        InvalidRequest: it can be read in no way, or in two.
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
    """As browsers quote it: of the characters that would end the quotes or the line nothing is left."""
    name = values.get(b"filename")
    charset, quote, extended = values.get(b"filename*", b"").partition(b"'")
    if quote and charset.lower() == b"utf-8":
        name = unquote_to_bytes(extended.partition(b"'")[2])
    elif name is None:
        return b"file" if b"filename*" in values else None
    return _CONTROL.sub(b"", name).replace(b'"', b"%22").replace(b"\\", b"%5C")[:512]
