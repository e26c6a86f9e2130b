"""Who has which stored response."""

from __future__ import annotations

from proxy.flow.stored import StoredResponses


def test_a_response_is_found_with_its_own_client_alone() -> None:
    stored = StoredResponses(10)
    stored.remember("resp_1", "http://a", "me")
    assert stored.holder("resp_1", "me") == "http://a"
    assert stored.holder("resp_1", "you") == stored.holder("resp_2", "me") == stored.holder("resp_2", "") == ""


def test_the_one_that_nobody_asked_for_the_longest_is_forgotten_first() -> None:
    stored = StoredResponses(2)
    stored.remember("resp_1", "http://a", "")
    stored.remember("resp_2", "http://b", "")
    assert stored.holder("resp_1", "") == "http://a"
    stored.remember("resp_3", "http://c", "")
    assert [stored.holder(f"resp_{n}", "") for n in (1, 2, 3)] == ["http://a", "", "http://c"]
    assert len(stored) == 2


def test_asking_for_another_clients_does_not_keep_it() -> None:
    stored = StoredResponses(2)
    stored.remember("resp_1", "http://a", "me")
    stored.remember("resp_2", "http://b", "me")
    stored.holder("resp_1", "you")
    stored.remember("resp_3", "http://c", "me")
    assert stored.holder("resp_1", "me") == ""
