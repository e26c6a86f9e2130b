"""/docs, and the request bodies in the OpenAPI document."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from pd_proxy.api.docs_page import HEADERS, render
from pd_proxy.app import build
from pd_proxy.requests.body import read_body
from pd_proxy.requests.endpoints import LAYOUTS
from pd_proxy.settings.tree import Settings

from tests.support import pools, running_gateway

DOCUMENT = build(Settings()).surface.openapi()


class Page(HTMLParser):
    """The texts and the loaded addresses of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "action", "data")
        ]
        assert not any(name.startswith("on") or name == "style" for name, _ in attributes)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/"])
async def test_the_page_loads_nothing_and_has_no_scripts(path: str) -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False) as running:
        answer = await running.http.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert answer.headers["x-content-type-options"] == "nosniff"
        page = Page(answer.text)
        assert page.fetched == ["openapi.json"]
        assert not {"script", "img", "iframe", "link", "object", "form"} & set(page.tags)
        assert not re.search(r"url\(|@import|javascript:", answer.text)
        assert "127.0.0.1:9" not in answer.text
        assert (await running.http.head(path)).status_code == 200


async def test_the_page_shows_every_route_of_the_document() -> None:
    page = Page(render(DOCUMENT))
    for path, item in DOCUMENT["paths"].items():
        assert path in page.text
        for operation in item.values():
            assert operation.get("summary", "") in page.text
    assert "max_completion_tokens" in page.text and "What does a decode node do?" in page.text
    assert "lora_path" in page.text, "of bodies that are FastAPI's too"
    assert "instances" in page.text


def test_texts_of_the_document_are_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&"
    operation: dict[str, Any] = {
        **{"tags": [evil], "summary": evil, "description": evil},
        "parameters": [{"name": evil, "in": evil, "schema": {"type": evil}, "description": evil}],
        "requestBody": {"content": {evil: {"schema": {"properties": {evil: {"type": evil}}, "examples": [evil]}}}},
        "responses": {evil: {"description": evil}},
    }
    document = {"info": {"title": evil, "version": evil, "description": evil}, "paths": {evil: {evil: operation}}}
    page = Page(render(document))
    assert "script" not in page.tags and page.text.count("alert(1)") >= 12
    assert HEADERS["content-security-policy"]


async def test_page_and_document_can_be_disabled() -> None:
    async with running_gateway(["http://127.0.0.1:9"], ready=False, routes={"docs": False}) as running:
        for path in ("/docs", "/redoc", "/openapi.json", "/no/such"):
            answer = await running.http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")
            assert "openapi" not in answer.json()["error"]["message"].replace(path, "")


@pytest.mark.parametrize("endpoint", LAYOUTS)
def test_the_schema_of_a_route_has_the_members_that_the_gateway_reads_and_a_valid_example(endpoint: Any) -> None:
    layout = LAYOUTS[endpoint]
    if layout.path not in DOCUMENT["paths"]:
        layout_paths = {"/generate", "/inference/v1/generate"}
        assert layout.path in layout_paths, "it is served only where it is set"
        return
    schema = DOCUMENT["paths"][layout.path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is True
    assert set(layout.reads) <= schema["properties"].keys()
    assert layout.prompt[0] in schema["properties"]

    for example in schema["examples"]:
        assert example.keys() <= schema["properties"].keys() and set(schema["required"]) <= example.keys()
        assert read_body(json.dumps(example).encode(), endpoint).model == "my-model"


async def test_the_examples_are_requests_that_succeed() -> None:
    async with pools(unknown_model="default", default_model="sim") as (running, _, _):
        document = (await running.http.get("/openapi.json")).json()
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize"):
            [schema] = [c["schema"] for c in document["paths"][path]["post"]["requestBody"]["content"].values()]
            for example in schema["examples"]:
                answer = await running.http.post(path, json=example)
                assert answer.status_code == 200, (path, answer.text)
