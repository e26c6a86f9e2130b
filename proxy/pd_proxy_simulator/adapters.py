"""The LoRA adapters of an engine: loaded and unloaded at run time, and listed beside the model.

Invariant: an adapter's weights follow from the model's weights and from the adapter's path alone. Two engines with the
same adapter generate the same text; an adapter with another path under the same name generates another text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from zlib import crc32

from pd_proxy_simulator.config import SimulatorConfig
from pd_proxy_simulator.errors import RequestError


class Adapters:
    """The adapters of one engine.

    Arguments:
        config: names the adapters that are loaded at the start.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self._config = config
        self._paths = {name: f"/adapters/{name}" for name in config.adapters}

    def served(self, model: object) -> SimulatorConfig:
        """The engine's configuration for a request for `model`: with the adapter's name and weights where `model`
        names an adapter."""
        config = self._config
        if not isinstance(model, str) or model not in self._paths:
            return config
        return replace(config, model=model, weights=config.weights + 1 + crc32(self._paths[model].encode()))

    def load(self, body: dict[str, Any]) -> str:
        """Handles `POST /v1/load_lora_adapter`. Raises RequestError."""
        name, path = body.get("lora_name"), body.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
            raise RequestError(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name == self._config.model or (name in self._paths and not body.get("load_inplace")):
            message = f"The lora adapter '{name}' has already been loaded."
            raise RequestError(400, "InvalidUserInput", message)
        self._paths[name] = path
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> str:
        """Handles `POST /v1/unload_lora_adapter`. Raises RequestError."""
        name = body.get("lora_name")
        if name not in self._paths:
            raise RequestError(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        del self._paths[name]
        return f"Success: LoRA adapter '{name}' removed successfully."

    def cards(self) -> list[dict[str, Any]]:
        """What /v1/models lists: the model, then the adapters."""
        config = self._config
        common = {"object": "model", "created": 0, "owned_by": "vllm"}
        root = config.root or config.model
        cards = [
            {"id": config.model, **common, "root": root, "parent": None, "max_model_len": config.context},
            *(
                {"id": name, **common, "root": path, "parent": config.model, "max_model_len": None}
                for name, path in self._paths.items()
            ),
        ]
        return [{**card, "permission": []} for card in cards]
