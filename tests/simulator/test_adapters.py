"""The LoRA adapters of the simulated engine, and what it reports of its version and configuration."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support import completion, simulators, text_of

ASK = {"do_remote_decode": True, "do_remote_prefill": False}


async def post(url: str, path: str, body: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False, verify=False) as http:
        return await http.post(url + path, json=body)


async def text_from(url: str, **more: Any) -> str:
    answer = await post(url, "/v1/completions", completion(**more))
    assert answer.status_code == 200, answer.text
    return text_of(answer.json())


async def handed_over(prefill: str, decode: str, model: str, other: str = "") -> httpx.Response:
    """A hand-off from one engine to another, for `model` at prefill and `other` (or the same) at decode."""
    first = completion(model=model, max_tokens=1, ignore_eos=True, kv_transfer_params=ASK)
    params = (await post(prefill, "/v1/completions", first)).json()["kv_transfer_params"]
    return await post(decode, "/v1/completions", completion(model=other or model, kv_transfer_params=params))


async def test_an_adapter_generates_another_text_than_its_model_and_the_same_on_every_engine() -> None:
    async with simulators("mixed", "mixed", adapters=("a", "b")) as [one, two]:
        texts = [await text_from(one.url, model=model) for model in ("sim", "a", "b")]
        assert len(set(texts)) == 3
        assert [await text_from(two.url, model=model) for model in ("sim", "a", "b")] == texts


async def test_adapters_are_loaded_and_unloaded() -> None:
    async with simulators("mixed") as [engine]:
        assert (await post(engine.url, "/v1/completions", completion(model="a"))).status_code == 404
        body = {"lora_name": "a", "lora_path": "/adapters/a"}
        assert (await post(engine.url, "/v1/load_lora_adapter", body)).status_code == 200
        assert (await post(engine.url, "/v1/load_lora_adapter", body)).status_code == 400
        assert await text_from(engine.url, model="a")
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            cards = (await http.get(f"{engine.url}/v1/models")).json()["data"]
        assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
            ("sim", "sim", None),
            ("a", "/adapters/a", "sim"),
        ]
        assert (await post(engine.url, "/v1/unload_lora_adapter", body)).status_code == 200
        refused = await post(engine.url, "/v1/completions", completion(model="a"))
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")
        assert (await post(engine.url, "/v1/unload_lora_adapter", body)).status_code == 404
        assert (await post(engine.url, "/v1/load_lora_adapter", {"lora_name": "a"})).status_code == 400


async def test_the_kv_cache_of_one_model_is_wrong_for_another() -> None:
    async with simulators("prefill", "decode", adapters=("a",)) as [p, d]:
        right = await text_from(d.url, model="a", cache_salt="apart")
        assert text_of((await handed_over(p.url, d.url, "a")).json()) == right
    async with simulators("prefill", "decode", adapters=("a",)) as [p, d]:
        assert text_of((await handed_over(p.url, d.url, "sim", "a")).json()) != right


async def test_engines_of_two_versions_or_two_roots_do_not_read_from_each_other() -> None:
    for other in ({"version": "0.33.0"}, {"root": "/elsewhere"}):
        async with simulators("prefill") as [p], simulators("decode", **other) as [d]:
            assert (await handed_over(p.url, d.url, "sim")).status_code == 500
            assert d.engine.stats.failed_transfers == 1


async def test_the_configuration_is_shown_in_development_mode_only() -> None:
    async with simulators("mixed", dev_mode=False) as [plain], simulators("mixed") as [told]:
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            assert (await http.get(f"{plain.url}/server_info")).status_code == 404
            page = (await http.get(f"{told.url}/server_info?config_format=json")).json()
        assert page["vllm_config"]["kv_transfer_config"]["kv_connector"] == "NixlConnector"
