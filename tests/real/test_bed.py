"""The test bed itself, without the gateway: failures here are about the engines and not about pd-proxy."""

from __future__ import annotations

import pytest

from .bed import Bed, hand_off_by_hand
from .engines import BLOCK_SIZE
from .questions import COMPARED_QUESTIONS, PROMPT_TOKENS, Api, Question

pytestmark = pytest.mark.real

ONE_OF_EACH_API = [Question(api, False, 129) for api in Api]


@pytest.mark.parametrize("question", ONE_OF_EACH_API, ids=str)
def test_a_hand_off_by_hand_gives_the_single_engines_answer(bed: Bed, question: Question) -> None:
    answer = hand_off_by_hand(bed.prefill, bed.decode, question.api, question.body())
    assert answer == bed.single[question]


def test_the_single_engine_received_prompts_of_the_intended_lengths(bed: Bed) -> None:
    completions = [question for question in COMPARED_QUESTIONS if question.api is Api.COMPLETIONS]
    seen = {question.tokens: bed.single[question].usage["prompt_tokens"] for question in completions}
    assert seen == {tokens: tokens for tokens in PROMPT_TOKENS}
    assert {BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1} <= set(seen)


def test_the_single_engines_answers_differ_and_end_for_different_reasons(bed: Bed) -> None:
    answers = [bed.single[question] for question in COMPARED_QUESTIONS if not question.stream]
    assert len({answer.text for answer in answers}) > len(answers) * 0.8
    assert {answer.finish_reason for answer in answers} == {"length", "stop"}
