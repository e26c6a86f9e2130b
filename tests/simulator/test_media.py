"""Simulated encoders, and engines that fetch their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pd_proxy_simulator import SimulatorConfig

from .helpers import Client, Start, chat

PATH = "/v1/chat/completions"
CPU = {"encoder_connector": "cpu"}


def part(name: str = "cat", **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:{name}"}, "uuid": f"key-{name}", **more}


def with_parts(*parts: Any, **more: Any) -> dict[str, Any]:
    return chat(**more) | {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, *parts]}]}


async def text_from(client: Client, sim: Any, *parts: Any, **more: Any) -> str:
    answer = await client.post(sim, PATH, with_parts(*parts, **more))
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


async def handles(client: Client, encoder: Any, *parts: Any, **more: Any) -> Any:
    answer = await client.post(encoder, PATH, {"messages": [{"role": "user", "content": list(parts)}], **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == ""
    assert answer.json()["usage"]["completion_tokens"] == 0
    return answer.json()["ec_transfer_params"]


async def test_an_embedding_is_fetched_by_its_key(start: Start, client: Client) -> None:
    encoder, engine = await start(role="encode", **CPU), await start(**CPU)
    params = await handles(client, encoder, part("cat"), part("dog"), part("cat"))
    assert {key: handle["item_indices"] for key, handle in params.items()} == {"key-cat": [0, 2], "key-dog": [1]}
    expected = await text_from(client, await start(), part("cat"))
    assert await text_from(client, engine, part("cat"), ec_transfer_params=params) == expected
    assert (engine.engine.media.encoded, engine.engine.media.fetched_from_others) == (0, 1)


async def test_a_shared_folder_needs_no_parameters(start: Start, client: Client, tmp_path: Path) -> None:
    shared = {"encoder_connector": "example", "encoder_storage": str(tmp_path)}
    encoder, engine = await start(role="encode", **shared), await start(**shared)
    await handles(client, encoder, part())
    assert await text_from(client, engine, part()) == await text_from(client, await start(), part())
    assert (engine.engine.media.encoded, engine.engine.media.fetched_from_others) == (0, 1)


async def test_another_medium_under_the_same_key_leads_to_another_text(start: Start, client: Client) -> None:
    encoder, engine = await start(role="encode", **CPU), await start(**CPU)
    params = await handles(client, encoder, part("dog", uuid="key"))
    assert await text_from(client, engine, part("cat", uuid="key"), ec_transfer_params=params) != await text_from(
        client, await start(), part("cat")
    )


async def test_processing_options_are_a_part_of_the_key(start: Start, client: Client) -> None:
    encoder, engine = await start(role="encode", **CPU), await start(**CPU)
    params = await handles(client, encoder, part(), mm_processor_kwargs={"size": 1})
    assert list(params) != ["key-cat"]
    await text_from(client, engine, part(), ec_transfer_params=params)
    assert engine.engine.media.missed == 1
    await text_from(client, engine, part(), ec_transfer_params=params, mm_processor_kwargs={"size": 1})
    assert engine.engine.media.fetched_from_others == 1


async def test_a_missing_embedding_is_made_here_and_fails_where_only_its_name_came(
    start: Start, client: Client
) -> None:
    encoder, engine = await start(role="encode", **CPU), await start(**CPU)
    params = await handles(client, encoder, part())
    encoder.kill()
    assert await text_from(client, engine, part(), ec_transfer_params=params) == await text_from(
        client, await start(), part()
    )
    assert (engine.engine.media.missed, engine.engine.media.encoded) == (1, 1)
    reference = {"type": "image_embeds", "image_embeds": {"grid": [1, 4, 4]}, "uuid": "key-cat"}
    assert (await client.post(engine, PATH, with_parts(reference, ec_transfer_params=params))).status_code == 500


@pytest.mark.parametrize("handle", [{"peer_host": "h"}, {"peer_host": "h", "peer_port": "1", "size_bytes": 1}, []])
async def test_a_broken_handle_kills_the_engine(start: Start, client: Client, handle: Any) -> None:
    engine = await start(**CPU)
    answer = await client.post(engine, PATH, with_parts(part(), ec_transfer_params={"key-cat": handle}))
    assert answer.status_code == 500
    assert engine.engine.dead


async def test_handles_that_are_no_object_are_refused(start: Start, client: Client) -> None:
    engine = await start(**CPU)
    assert (await client.post(engine, PATH, with_parts(part(), ec_transfer_params=[1]))).status_code == 400


async def test_an_encoder_refuses_a_medium_without_content(start: Start, client: Client) -> None:
    encoder = await start(role="encode", **CPU)
    assert (await client.post(encoder, PATH, with_parts(part(image_url=None)))).status_code == 400


@pytest.mark.parametrize(
    "settings", [{"role": "encode"}, {"encoder_connector": "example"}, {"encoder_storage": "somewhere"}]
)
def test_a_configuration_with_which_no_encoder_could_run_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="encoder"):
        SimulatorConfig(**settings)
