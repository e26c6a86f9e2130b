"""Prefill's answer, decoded once: the hand-off, the first token and the usage are taken from the same reading."""

from __future__ import annotations

import msgspec

from pd_proxy.decoding import Undecodable, json_decoder
from pd_proxy.encoding import ABSENT
from pd_proxy.errors import BackendGarbled


class PrefillAnswer(msgspec.Struct):
    """The members of prefill's answer that are read, each as the bytes that it came as; `ABSENT` where it has none.

    Attributes:
        body: the whole answer, for a client that gets all of it.
    """

    choices: msgspec.Raw = ABSENT
    content: msgspec.Raw = ABSENT
    output: msgspec.Raw = ABSENT
    kv_transfer_params: msgspec.Raw = ABSENT
    prompt_token_ids: msgspec.Raw = ABSENT
    usage: msgspec.Raw = ABSENT
    prompt_token_ids_b64: msgspec.Raw = ABSENT
    id: msgspec.Raw = ABSENT
    created: msgspec.Raw = ABSENT
    model: msgspec.Raw = ABSENT
    system_fingerprint: msgspec.Raw = ABSENT
    prompt_text: msgspec.Raw = ABSENT
    body: msgspec.Raw = ABSENT

    def lacks(self) -> str:
        """A member that a client needs and that the answer does not have; or an empty string."""
        for name in ("created", "id", "model"):
            if getattr(self, name) is ABSENT:
                return name
        return ""


_decode_answer = json_decoder(PrefillAnswer)


def read_answer(answer: bytes, member: str = "choices") -> PrefillAnswer:
    """Read prefill's answer.

    Arguments:
        member: the one that every answer has (`Layout.answer`).
    Raises:
        BackendGarbled: the bytes are not an answer.
    """
    try:
        parsed = _decode_answer(answer)
    except Undecodable as error:
        raise BackendGarbled(f"prefill's answer is not one: {error}") from None
    if parsed.choices is ABSENT and getattr(parsed, member) is ABSENT:
        raise BackendGarbled(f"prefill's answer has no {member}")
    parsed.body = msgspec.Raw(answer)
    return parsed
