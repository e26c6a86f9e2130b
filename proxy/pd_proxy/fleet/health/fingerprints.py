"""The fingerprints by which an engine's own pages show which hand-off protocol it speaks.

Each connector has fingerprints (`Traits.fingerprints`): names on the pages of engines that speak its protocol.

- `/server_info` (`/get_server_info` of older SGLang): vLLM reports its configuration there, with its connector's name,
  if it was started with `VLLM_SERVER_DEV_MODE=1`; SGLang reports `disaggregation_mode`; TensorRT-LLM reports
  `disaggregated_params`.
- `/metrics`: some of vLLM's connectors have series of their own, which exist from the engine's start on.

The configuration takes precedence over the series, since NixlConnector and NixlPushConnector have the same series.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pd_proxy.decoding import Undecodable, decode_json

CONFIGURATION = ("/server_info?config_format=json", "/get_server_info")

_SERIES = re.compile(rb"^(?:# TYPE )?(vllm:[a-z0-9]+_)", re.MULTILINE)


def configured(page: bytes) -> list[str]:
    """The fingerprints on a page of an engine's configuration; empty if the page is none, or has no fingerprints."""
    try:
        configuration = decode_json(page)
    except Undecodable:
        return []
    if not isinstance(configuration, dict):
        return []
    if configuration.get("disaggregation_mode") in ("prefill", "decode"):
        return ["sglang"]
    if isinstance(configuration.get("disaggregated_params"), dict):
        return ["tensorrt_llm"]
    config = configuration.get("vllm_config")
    return list(_vllm_connectors(config.get("kv_transfer_config") if isinstance(config, dict) else None))


def _vllm_connectors(transfer: Any) -> Iterator[str]:
    """The connectors of a `kv_transfer_config`; of a MultiConnector the ones that it contains."""
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
    """The fingerprints on a page of metrics: the prefixes of its series' names, such as `vllm:nixl_`."""
    return sorted({prefix.decode("latin-1") for prefix in _SERIES.findall(page)})


def speaker(fingerprints: list[str], known: Mapping[str, frozenset[str]]) -> str:
    """The connector that has some of these fingerprints; empty if none has, or several have.

    Arguments:
        known: the fingerprints of each connector.
    """
    found = [name for name, its in known.items() if not its.isdisjoint(fingerprints)]
    return found[0] if len(found) == 1 else ""
