"""The parts that decide where requests go, with the prefix index."""

from __future__ import annotations

import random

import msgspec

from pd_proxy.assembly.connectors import Connectors
from pd_proxy.fleet.fleet import Fleet
from pd_proxy.flow.first_token import FirstTokens
from pd_proxy.flow.placing import Placing
from pd_proxy.flow.prompts import Prompts
from pd_proxy.prefix.index import PrefixIndex
from pd_proxy.settings.tree import Settings


class Placement(msgspec.Struct, frozen=True):
    """The parts of placement.

    Attributes:
        prefix_key: the key of the hashes of prompts; the workers of one gateway have the same.
        prompts: the prefix index, and the prompts that are in flight.
        first_tokens: decides whether the client gets prefill's first token.
        placing: chooses the backends of a request.
    """

    prefix_key: bytes
    prompts: Prompts
    first_tokens: FirstTokens
    placing: Placing


def make_placement(settings: Settings, fleet: Fleet, connectors: Connectors, prefix_key: bytes) -> Placement:
    """Make these parts. Where a policy reads the prefix index, it follows the engines' reports on their caches."""
    prompts = Prompts(PrefixIndex(), prefix_key)
    in_use = connectors.in_use
    first_tokens = FirstTokens(settings, in_use)
    placing = Placing(settings, fleet, connectors.by_name, in_use, first_tokens, prompts, random.random)
    if placing.looks:
        fleet.subscribe(on_cache=prompts.learnt, on_lost_cache=prompts.lost)
    return Placement(prefix_key, prompts, first_tokens, placing)
