"""By what an engine's own pages show which hand-off protocol it speaks.

Each connector has fingerprints (`Traits.fingerprints`): names that an engine which speaks it uses of itself. They come
from

- `/server_info` (`/get_server_info` on older SGLang): vLLM gives its configuration there, with its connector's name, if
  it was started with `VLLM_SERVER_DEV_MODE=1`; SGLang says `disaggregation_mode`; TensorRT-LLM `disaggregated_params`;
- `/metrics`: the names of the series that some of vLLM's connectors have, from the engine's start on.

What was configured goes before what series hint at: NixlConnector and NixlPushConnector have the same series.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pd_proxy.decoding import Undecodable, decode_json

CONFIGURATION = ("/server_info?config_format=json", "/get_server_info")

_SERIES = re.compile(rb"^(?:# TYPE )?(vllm:[a-z0-9]+_)", re.MULTILINE)


def configured(page: bytes) -> list[str]:
    """The marks that a page of an engine's configuration shows; empty where it is none, or says nothing of it."""
    try:
        page_says = decode_json(page)
    except Undecodable:
        return []
    if not isinstance(page_says, dict):
        return []
    if page_says.get("disaggregation_mode") in ("prefill", "decode"):
        return ["sglang"]
    if isinstance(page_says.get("disaggregated_params"), dict):
        return ["tensorrt_llm"]
    config = page_says.get("vllm_config")
    return list(_vllm_connectors(config.get("kv_transfer_config") if isinstance(config, dict) else None))


def _vllm_connectors(transfer: Any) -> Iterator[str]:
    """The connectors of a `kv_transfer_config`; those that a MultiConnector holds instead of itself."""
    if not isinstance(transfer, dict):
        return
    extra = transfer.get("kv_connector_extra_config")
    parts = extra.get("connectors") if isinstance(extra, dict) else None
    if isinstance(parts, list):
        for part in parts:
            yield from _vllm_connectors(part)
    elif isinstance(name := transfer.get("kv_connector"), str):
        yield name


def counted(page: bytes) -> list[str]:
    """The marks that a page of metrics shows: how the names of its series begin, as `vllm:nixl_`."""
    return sorted({mark.decode("latin-1") for mark in _SERIES.findall(page)})


def speaker(marks: list[str], known: Mapping[str, frozenset[str]]) -> str:
    """The connector that has some of these marks; empty where none has, or several have.

    Arguments:
        known: every connector's marks.
    """
    found = [name for name, its in known.items() if not its.isdisjoint(marks)]
    return found[0] if len(found) == 1 else ""
