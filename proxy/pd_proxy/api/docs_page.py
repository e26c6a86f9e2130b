"""/docs: the OpenAPI document as an HTML page. The page has no script and loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import defaultdict
from html import escape
from typing import Any

Schema = dict[str, Any]

_STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:0 auto;padding:1rem}
h2{margin:2rem 0 .5rem;text-transform:capitalize}
details{border:1px solid #8886;border-radius:.4rem;margin:.4rem 0;padding:.4rem .8rem}
summary{cursor:pointer;overflow-wrap:anywhere}
code,pre{font-family:ui-monospace,monospace;font-size:.9em}
pre{background:#8882;padding:.6rem;border-radius:.4rem;overflow-x:auto}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #8884}
.method{display:inline-block;min-width:3.4rem;font-weight:700}
.old{text-decoration:line-through}
"""
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Headers of the page, with which a browser forbids it to run scripts or load anything."""

_ORDER = ("inference", "models", "responses", "service", "probes", "metrics", "administration", "engines")


def render(document: Schema) -> str:
    """The HTML page of an OpenAPI document.

    Arguments:
        document: an OpenAPI 3.1 document in which each operation has one tag.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for path, item in document["paths"].items():
        for method, operation in item.items():
            groups[operation["tags"][0]].append(_operation(path, method, operation, document))
    tags = sorted(groups, key=lambda tag: (_ORDER.index(tag) if tag in _ORDER else len(_ORDER), tag))
    sections = "".join(f"<h2>{escape(tag)}</h2>{''.join(groups[tag])}" for tag in tags)
    info = document["info"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))}</p>"
        '<p>For machines: <a href="openapi.json">openapi.json</a></p>'
        f"{sections}</body></html>"
    )


def _operation(path: str, method: str, operation: Schema, document: Schema) -> str:
    old = ' class="old"' if operation.get("deprecated") else ""
    body = f"<p>{escape(operation.get('description', ''))}</p>"
    if parameters := operation.get("parameters"):
        rows = [
            (f"{one['name']} ({one['in']})", _type(one.get("schema", {}), document), _about(one, one.get("schema", {})))
            for one in parameters
        ]
        body += f"<h4>Parameters</h4>{_table(rows)}"
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        body += f"<h4>Body: {escape(kind)}</h4>{_members(content.get('schema', {}), document)}"
    rows = [(status, "", _about(one)) for status, one in operation["responses"].items()]
    body += f"<h4>Answers</h4>{_table(rows)}"
    return (
        f'<details><summary><span class="method">{escape(method.upper())}</span> <code{old}>{escape(path)}</code> '
        f"{escape(operation.get('summary', ''))}</summary>{body}</details>"
    )


def _members(schema: Schema, document: Schema) -> str:
    schema = _resolved(schema, document)
    required = schema.get("required", ())
    rows = [
        (name + ("" if name in required else " (optional)"), _type(one, document), _about(_resolved(one, document)))
        for name, one in schema.get("properties", {}).items()
    ]
    shown = _table(rows) if rows else ""
    for example in schema.get("examples", ()):
        shown += f"<pre>{escape(json.dumps(example, indent=2))}</pre>"
    return shown


def _table(rows: list[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(about)}</td></tr>"
        for name, kind, about in rows
    )
    return f"<table>{cells}</table>"


def _resolved(schema: Schema, document: Schema) -> Schema:
    if reference := schema.get("$ref"):
        found: Schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        return found
    return schema


def _type(schema: Schema, document: Schema) -> str:
    """A schema's type in a few words."""
    schema = _resolved(schema, document)
    if choices := schema.get("enum"):
        return " | ".join(map(str, choices))
    if some := schema.get("anyOf"):
        return " | ".join(dict.fromkeys(filter(None, (_type(one, document) for one in some))))
    kind = schema.get("type", "")
    named = " | ".join(kind) if isinstance(kind, list) else str(kind)
    if kind == "array" and (items := _type(schema.get("items", {}), document)):
        return f"array of {items}"
    return named


def _about(*schemas: Schema) -> str:
    return next((one["description"] for one in schemas if one.get("description")), "")
