"""Engines that share a cache of KV blocks: LMCache (a server, or a store that all reach), MooncakeStoreConnector,
ExampleConnector, HF3FSKVConnector, FlexKVConnectorV1.

Prefill stores its blocks there under the hash of their tokens, and decode looks them up, so the legs carry no
parameters.
A miss is not a failure: decode computes the prompt, and its answer cannot be wrong. Prefill keeps nothing for a decode
leg that does not come, so nothing has to be freed.
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
