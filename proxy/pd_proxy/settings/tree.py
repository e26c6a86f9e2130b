"""The tree of settings, frozen and validated once.

A setting has the same name everywhere: `timeouts.prefill` in the file, `PD_PROXY_TIMEOUTS__PREFILL` in the environment,
`--timeouts.prefill` as a flag. Flags override the environment, and the environment overrides the file. Unknown names
are errors in all three, since a misspelt setting that is ignored would be noticed only in production.

A secret may be given as a reference, `file:PATH` or `env:VARIABLE`, so that it is neither in the list of processes nor
in the settings file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from pd_proxy.settings import checks
from pd_proxy.settings.environment import read_variables
from pd_proxy.settings.fields import SettingsFields
from pd_proxy.settings.secrets import referred_environment
from pd_proxy.settings.types import Group


class Settings(SettingsFields):
    """All settings."""

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        for check in checks.ALL:
            check(self)
        return self

    def share(self, workers: int) -> Settings:
        """The settings of one of several workers: its share of the bounds of the whole gateway. Bounds of backends are
        not divided, since the workers know each other's load."""

        def part(bound: int | None) -> int | None:
            return bound if bound is None else -(-bound // workers)

        bounds = {name: part(getattr(self.admission, name)) for name in ("requests", "tokens", "queue", "queue_bytes")}
        clients = tuple(
            client.model_copy(update={"requests": part(client.requests), "tokens": part(client.tokens)})
            for client in self.clients
        )
        retries = self.retries.model_copy(update={"floor": part(self.retries.floor)})
        limits = self.limits.model_copy(
            update={"connections": part(self.limits.connections), "bodies": part(self.limits.bodies)}
        )
        admission = self.admission.model_copy(update=bounds)
        return self.model_copy(
            update={"admission": admission, "clients": clients, "retries": retries, "limits": limits}
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: object,
        **more: object,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `build_settings` passes all sources as one argument, in the order of priority. `environment.py` reads the
        # environment, since the source of pydantic-settings handles neither Kubernetes' variables nor misspelt names.
        values = cast(InitSettingsSource, init_settings).init_kwargs
        layers = cast("tuple[Mapping[str, Any], ...]", values.pop(_LAYERS, ()))
        return init_settings, *(InitSettingsSource(settings_cls, dict(layer)) for layer in layers)


_LAYERS = "layers"


def build_settings(
    flags: Mapping[str, Any], file_values: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Settings:
    """The settings from flags, environment and file.

    Arguments:
        flags, file_values: nested mappings of setting names.
        environment: the environment; None: that of the process.
    Raises:
        pydantic.ValidationError: a value is wrong or a key unknown.
    """
    environment = os.environ if environment is None else environment
    variables = read_variables(environment, setting_names())
    layers: dict[str, Any] = {_LAYERS: (flags, variables.values, file_values, variables.defaults)}
    token = referred_environment.set(environment)
    try:
        return Settings(**layers)
    finally:
        referred_environment.reset(token)


@cache
def setting_names() -> frozenset[str]:
    """The dotted names of all settings."""
    return frozenset(name for name, _ in leaves())


def leaves(model: type[BaseModel] = Settings, prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """All settings with their dotted names."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        if _is_group(field):
            found += leaves(cast("type[BaseModel]", field.annotation), f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def _is_group(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Group)
