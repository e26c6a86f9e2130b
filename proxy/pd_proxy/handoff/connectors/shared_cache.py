"""Engines that share a cache of KV blocks: LMCache (a server, or a store that all reach), MooncakeStoreConnector,
ExampleConnector, HF3FSKVConnector, FlexKVConnectorV1.

Prefill leaves its blocks there under the hash of their tokens, and decode looks for them: the legs are told nothing of
each other. A miss is no failure: decode computes the prompt then, and nothing can be wrong. So nothing is held for a
decode that does not come, and nothing is to be freed.
"""

from __future__ import annotations

from pd_proxy.handoff.answer import PrefillAnswer
from pd_proxy.handoff.connector import Connector, Handoff
from pd_proxy.handoff.traits import Traits

_PRIMED = Handoff({})


class SharedCache(Connector):
    """Any connector that finds blocks by their content."""

    traits = Traits(
        name="shared_cache",
        may_miss=True,
    )

    def take(self, answer: PrefillAnswer) -> Handoff | None:
        return _PRIMED
