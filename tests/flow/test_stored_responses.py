"""The name of a stored response shows which backend has it."""

from __future__ import annotations

import pytest
from pd_proxy.flow.stored_responses import StoredResponses

UNIQUE = "0123456789abcdef" * 2
URLS = ["http://a", "http://b", "http://c"]


def named(stored: StoredResponses, url: str = "http://b", client: str = "me") -> str:
    return f"resp_{stored.name(UNIQUE, url, client)}"


def test_the_backend_is_found_by_the_name_and_by_its_client_alone() -> None:
    stored = StoredResponses(b"key")
    assert stored.holder(named(stored), "me", URLS) == "http://b"
    assert stored.holder(named(stored), "you", URLS) == ""
    assert stored.holder(named(stored), "me", ["http://a", "http://c"]) == ""


def test_a_gateway_with_the_same_key_finds_it_and_another_does_not() -> None:
    name = named(StoredResponses(b"key"))
    assert StoredResponses(b"key").holder(name, "me", URLS) == "http://b"
    assert StoredResponses(b"other").holder(name, "me", URLS) == ""


@pytest.mark.parametrize("name", ["", "resp_", f"resp_{UNIQUE}", f"resp_{UNIQUE}{'0' * 16}", "resp_" + "é" * 48])
def test_a_name_that_is_not_the_gateways_has_no_holder(name: str) -> None:
    assert StoredResponses(b"key").holder(name, "me", URLS) == ""
