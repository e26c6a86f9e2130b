"""The dialect of each endpoint by which engines generate. A new API is one file here and one line below."""

from __future__ import annotations

from pd_proxy.dialects.chat import CHAT
from pd_proxy.dialects.dialect import Dialect
from pd_proxy.dialects.generate import GENERATE
from pd_proxy.dialects.messages import MESSAGES
from pd_proxy.dialects.responses import RESPONSES
from pd_proxy.dialects.sglang import SGLANG

DIALECTS: dict[str, Dialect] = {
    "chat": CHAT,
    "completions": CHAT,
    "messages": MESSAGES,
    "responses": RESPONSES,
    "generate": GENERATE,
    "sglang_generate": SGLANG,
}
"""By the names of endpoints that `requests/endpoints.py` has."""
