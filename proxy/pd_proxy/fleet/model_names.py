"""Which model a request means: by its own name, by an alias, or by the setting that stands in for none.

What a client calls a model is translated here, once, on the way in; everything behind speaks of the engines' own
names, in metrics and in the answers too. The answer of an engine is not rewritten: its `model` is the one that served,
as OpenAI's answers to an alias of theirs name the model behind it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from difflib import get_close_matches
from typing import Any

from pd_proxy.errors import InvalidRequest, ModelNotFound
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.settings.tree import Settings

_MOST_NAMED = 8  # models that an error names
_MOST_NAMES = 100  # ... of which the nearest are looked for
_MOST_COMPARED = 64  # characters of a name: what it takes to compare grows with their square
_MOST_SHOWN = 256  # characters of a name


class Names:
    """Translates names.

    Arguments:
        ask: asks the engines which models they have; it returns when they have said.
    Attributes:
        aliases: other names of models, and the engines' own.
        any: there are aliases, or a default: names have to be looked at.
    """

    def __init__(self, settings: Settings, fleet: Fleet, ask: Callable[[], Awaitable[object]]) -> None:
        self.aliases = settings.aliases
        self._default = settings.aliases.get(settings.default_model, settings.default_model)
        self._stands_in = settings.unknown_model == "default"
        self._fleet = fleet
        self._ask = ask
        self.any = bool(self.aliases or self._default)

    async def meant(self, asked: str | None) -> str | None:
        """The model that a request for `asked` is for, as engines call it; None where it names none and need not.

        Raises:
            InvalidRequest: it names none, and there are several.
            ModelNotFound: nobody has such a model.
        """
        if asked is None:
            if not self._default and self._fleet.pairing.several_models:
                raise InvalidRequest("you must provide a `model`: this gateway serves several", param="model")
            asked = self._default or None
        model = self.aliases.get(asked, asked) if asked is not None else None
        if model is None or self._fleet.knows(model):
            return model
        return await self._find(model)

    async def known(self, model: str) -> None:
        """See that somebody has a model, by its own name.

        Raises:
            ModelNotFound: nobody has.
        """
        if await self._find(model) != model:  # what stands in has another name, and this one is on its way already
            raise self.not_found(model)

    async def _find(self, model: str) -> str:
        """A model that no engine is known to have: it may have been loaded a moment ago, as adapters are."""
        await self._ask()
        if self._fleet.knows(model) or self._fleet.names(model):
            return model
        if self._stands_in:
            return self._default
        raise self.not_found(model)

    def cards(self) -> list[dict[str, Any]]:
        """The models a client can ask for, as /v1/models shows them. An alias has the root of the model that it stands
        for, which is its parent. It is shown as long as that model is."""
        cards = {card["id"]: card for card in self._fleet.model_cards()}
        aliased = {
            alias: {**cards[model], "id": alias, "root": cards[model].get("root") or model, "parent": model}
            for alias, model in self.aliases.items()
            if model in cards
        }
        return list({**cards, **aliased}.values())

    async def card(self, model: str) -> dict[str, Any]:
        """One of them.

        Raises:
            ModelNotFound: nobody has it.
        """
        for attempt in ("known", "asked"):
            if found := next((card for card in self.cards() if card["id"] == model), None):
                return found
            if attempt == "known":
                await self._ask()
        raise self.not_found(model)

    def not_found(self, model: str) -> ModelNotFound:
        """The error for a model that nobody has. It names those that there are, the nearest first."""
        there = sorted(card["id"][:_MOST_SHOWN] for card in self.cards())
        near = get_close_matches(model[:_MOST_COMPARED], there[:_MOST_NAMES], n=3) if len(there) > _MOST_NAMED else []
        named = [*near, *(name for name in there if name not in near)][:_MOST_NAMED]
        more = f" and {len(there) - len(named)} more (GET /v1/models)" if len(there) > len(named) else ""
        served = f" This gateway serves {', '.join(f'`{name}`' for name in named)}{more}." if named else ""
        return ModelNotFound(f"The model `{model[:_MOST_SHOWN]}` does not exist.{served}", param="model")
