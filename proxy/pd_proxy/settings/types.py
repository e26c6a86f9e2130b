"""Types that several groups of settings share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from pd_proxy.decoding import decode_json_once
from pd_proxy.handoff.connectors.registry import CONNECTORS
from pd_proxy.settings.addresses import split_list

_LONGEST = 366 * 86400.0  # seconds; event loops refuse much longer timers


Seconds = Annotated[float, Field(gt=0, le=_LONGEST)]


SecondsOrZero = Annotated[float, Field(ge=0, le=_LONGEST)]


KindName = Literal["vllm", "sglang", "tensorrt_llm", "nim", "openai"]

if TYPE_CHECKING:
    ConnectorName = str
    ConnectorChoice = str
else:  # the registry has the names, so the choices are known at run time only
    ConnectorName = Literal[tuple(CONNECTORS)]
    ConnectorChoice = Literal[(*CONNECTORS, "auto")]


PolicyName = Literal["auto", "least_loaded", "prefix", "session", "round_robin", "random", "power_of_two"]


def parsed_list(shape: str) -> BeforeValidator:
    """Make a validator that reads a list of groups from one string of JSON, as in the environment and in flags.

    Arguments:
        shape: an example of the JSON, for the error.
    """

    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return decode_json_once(value)
        except ValueError:  # without the text, which may contain keys
            raise ValueError(f"as a variable or a flag this must be a JSON list: {shape}") from None

    return BeforeValidator(parse)


def _choices(annotation: Any) -> tuple[str, ...]:
    """The words that a setting may have; empty where it may have other values."""
    parts = get_args(annotation)
    return parts if parts and all(isinstance(part, str) for part in parts) else ()


def _is_number(annotation: Any) -> bool:
    parts = get_args(annotation)
    return annotation in (int, float) or bool(_choices(annotation) == () and any(map(_is_number, parts)))


class Group(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: object, info: ValidationInfo) -> object:
        """Accept words in any case, with hyphens or underscores; and `off`, which YAML reads as false. Refuse a boolean
        for a number."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool):
            if _is_number(annotation):
                raise ValueError(f"must be a number, not {str(value).lower()}")
            word = "on" if value else "off"
            return word if word in _choices(annotation) else value
        if isinstance(value, str) and (choices := _choices(annotation)):
            word = value.strip().lower().replace("-", "_")
            return word if word in choices else value
        if value is None and isinstance(annotation, type) and issubclass(annotation, Group):
            return {}  # a group whose members are all commented out
        return value


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


Ports = Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], BeforeValidator(split_list)]


def _mapped(value: object) -> object:
    """Read a mapping from one string of `name=model` with commas, as in the environment and in flags."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(sign for _, sign, _ in pairs):
        raise ValueError("as a variable or a flag this must be a list of name=model, separated by commas")
    return {name.strip(): model.strip() for name, _, model in pairs}


ModelName = Annotated[str, Field(min_length=1, max_length=256)]


Aliases = Annotated[dict[ModelName, ModelName], BeforeValidator(_mapped)]


def _log_level(value: object) -> object:
    """Accept other common names of levels too: `warn`, `critical`, `fatal`."""
    others = {"warn": "warning", "critical": "error", "fatal": "error"}
    return others.get(value.strip().lower(), value) if isinstance(value, str) else value


LogLevel = Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_log_level)]
