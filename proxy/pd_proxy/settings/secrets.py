"""Secrets in settings: given themselves, or as a reference to a file or a variable."""

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
"""How a secret begins that is not given itself, but by where it is."""


_PLACEHOLDER = re.compile(r"\$\{\w+[^}]*\}|\$\(\w+\)|\$[A-Z][A-Z0-9_]*|\{\{.*\}\}|<[\w -]+>")


def _secrets(value: object) -> object:
    """Several secrets: a list, or one string with commas. A file may hold several, one a line."""
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
    """A secret, from where it is if it was not given itself. None without characters: that one everybody has."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if not isinstance(value, str):
        return value
    value = _referred(value)
    if not value.strip():
        raise ValueError("an empty secret is none; for none leave the setting out")
    if _PLACEHOLDER.fullmatch(value):
        raise ValueError("this is a placeholder that nobody has replaced; a secret may also be file:PATH or env:NAME")
    if value != value.strip() or not value.isascii() or not value.isprintable():
        raise ValueError("a secret is printable ASCII without spaces around it, since it is sent in a header")
    return value


def _referred(value: str) -> str:
    """What `file:PATH` or `env:VARIABLE` names; else the value itself."""
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
        except ValueError:  # a null byte in the path, or bytes that are no text
            raise ValueError(f"{where}: it is not UTF-8 text") from None
    if text is not value and not text.strip():
        raise ValueError(f"{where} is empty or not there")
    return text


Secret = Annotated[SecretStr, BeforeValidator(_secret)]


Secrets = Annotated[tuple[Secret, ...], BeforeValidator(_secrets)]


referred_environment: ContextVar[Mapping[str, str]] = ContextVar("environment", default=os.environ)
"""Where `env:NAME` is looked up."""
