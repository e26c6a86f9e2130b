"""Secrets in settings, given directly or as a reference to a file or a variable."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, SecretStr

_IN_FILE = "file:"


_IN_VARIABLE = "env:"


REFERENCES = (_IN_FILE, _IN_VARIABLE)
"""The beginnings of references to secrets."""


_PLACEHOLDER = re.compile(r"\$\{\w+[^}]*\}|\$\(\w+\)|\$[A-Z][A-Z0-9_]*|\{\{.*\}\}|<[\w -]+>")


def _secrets(value: object) -> object:
    """Read several secrets: a list, or one string with commas. A file may have several, one on each line."""
    items = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    found: list[object] = []
    for item in items:
        if isinstance(item, str) and item.startswith(_IN_FILE):
            found += [line.strip() for line in _referred(item).splitlines() if line.strip()]
        else:
            found.append(item)
    return found


def _secret(value: object) -> object:
    """Read a secret, which may be given as a reference. An empty one is refused, since everybody knows it."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if not isinstance(value, str):
        return value
    value = _referred(value)
    if not value.strip():
        raise ValueError("a secret must not be empty; leave the setting out for none")
    if _PLACEHOLDER.fullmatch(value):
        raise ValueError("this is a placeholder that was not replaced; a secret may also be file:PATH or env:NAME")
    if value != value.strip() or not value.isascii() or not value.isprintable():
        raise ValueError("a secret must be printable ASCII without spaces around it, since it is sent in a header")
    return value


def _referred(value: str) -> str:
    """The text that `file:PATH` or `env:VARIABLE` refers to; for any other value, the value itself."""
    text = value
    if value.startswith(_IN_VARIABLE):
        where = value.removeprefix(_IN_VARIABLE)
        text = referred_environment.get().get(where, "")
        where = f"the variable {where}"
    elif value.startswith(_IN_FILE):
        where = value.removeprefix(_IN_FILE)
        try:
            text = Path(where).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}") from None
        except ValueError:  # a null byte in the path, or bytes that are not text
            raise ValueError(f"{where}: it is not UTF-8 text") from None
    if text is not value and not text.strip():
        raise ValueError(f"{where} is empty or does not exist")
    return text


Secret = Annotated[SecretStr, BeforeValidator(_secret)]


Secrets = Annotated[tuple[Secret, ...], BeforeValidator(_secrets)]


referred_environment: ContextVar[Mapping[str, str]] = ContextVar("environment", default=os.environ)
"""The environment in which `env:NAME` is looked up."""
