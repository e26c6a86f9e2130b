"""Finds the model that a request is for: by its name, by an alias, or by the setting `default_model`.

A client's name of a model is translated once, when the request comes in. All other parts of the gateway, metrics
included, use the engines' own names. Answers are not rewritten: their `model` is the one that served the request, just
as OpenAI's answers to a request for an alias name the model behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from typing import Any

from pd_proxy.errors import InvalidRequest, ModelNotFound
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.settings.tree import Settings

_MAX_NAMED = 8  # models that an error names
_MAX_NAMES = 100  # models among which the most similar names are searched
_MAX_COMPARED = 64  # characters of a name that are compared; the cost grows with their square
_MAX_SHOWN = 256  # characters of a name that an error shows


class Names:
    """Translates clients' names of models into the engines' names.

    Arguments:
        ask: asks the engines which models they have, and returns when they have answered.
    Attributes:
        aliases: the engines' names of models by alias.
        any: whether there are aliases or a default, so that names have to be translated.
    """

    def __init__(self, settings: Settings, fleet: Fleet, ask: Callable[[], Awaitable[object]]) -> None:
        self.aliases = settings.aliases
        self._default = settings.aliases.get(settings.default_model, settings.default_model)
        self._stands_in = settings.unknown_model == "default"
        self._fleet = fleet
        self._ask = ask
        self.any = bool(self.aliases or self._default)

    async def resolve(self, asked: str | None) -> str | None:
        """The engines' name of the model that a request for `asked` is for; None where the request may leave it out.

        Raises:
            InvalidRequest: the request names no model, and there are several.
            ModelNotFound: no backend has the model.
        """
        if asked is None:
            if not self._default and self._fleet.pairing.several_models:
                raise InvalidRequest("you must provide a `model`: this gateway serves several", param="model")
            asked = self._default or None
        model = self.aliases.get(asked, asked) if asked is not None else None
        if model is None or self._fleet.knows(model):
            return model
        return await self._find(model)

    async def require(self, model: str) -> None:
        """Check that a backend has a model of this name.

        Raises:
            ModelNotFound: no backend has it.
        """
        if await self._find(model) != model:  # the default cannot replace it, since the request's body stays as it is
            raise self.not_found(model)

    async def _find(self, model: str) -> str:
        """Ask the engines for a model that none is known to have, since adapters may have been loaded just now."""
        await self._ask()
        if self._fleet.knows(model) or self._fleet.names(model):
            return model
        if self._stands_in:
            return self._default
        raise self.not_found(model)

    def cards(self) -> list[dict[str, Any]]:
        """The models that clients can ask for, aliases included, as /v1/models shows them. An alias has its model as
        parent, and the root of that model. It is shown while that model is."""
        cards = {card["id"]: card for card in self._fleet.model_cards()}
        aliased = {
            alias: {**cards[model], "id": alias, "root": cards[model].get("root") or model, "parent": model}
            for alias, model in self.aliases.items()
            if model in cards
        }
        return list({**cards, **aliased}.values())

    async def card(self, model: str) -> dict[str, Any]:
        """The card of one model.

        Raises:
            ModelNotFound: no backend has it.
        """
        for attempt in ("known", "asked"):
            if found := next((card for card in self.cards() if card["id"] == model), None):
                return found
            if attempt == "known":
                await self._ask()
        raise self.not_found(model)

    def not_found(self, model: str) -> ModelNotFound:
        """The error for a model that no backend has. It names the existing models, those with similar names first."""
        there = sorted(card["id"][:_MAX_SHOWN] for card in self.cards())
        near = get_close_matches(model[:_MAX_COMPARED], there[:_MAX_NAMES], n=3) if len(there) > _MAX_NAMED else []
        named = [*near, *(name for name in there if name not in near)][:_MAX_NAMED]
        more = f" and {len(there) - len(named)} more (GET /v1/models)" if len(there) > len(named) else ""
        served = f" This gateway serves {', '.join(f'`{name}`' for name in named)}{more}." if named else ""
        return ModelNotFound(f"The model `{model[:_MAX_SHOWN]}` does not exist.{served}", param="model")
