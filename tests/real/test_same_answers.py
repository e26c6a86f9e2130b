"""Behind the gateway a pair of engines answers as one engine does."""

from __future__ import annotations

import pytest

from .bed import Bed
from .gateway import Gateway
from .questions import COMPARED_QUESTIONS, Question

pytestmark = pytest.mark.real


@pytest.mark.parametrize("question", COMPARED_QUESTIONS, ids=str)
def test_greedy_output_equals_a_single_engines(bed: Bed, gateway: Gateway, question: Question) -> None:
    answer, headers = question.ask(gateway.url)
    assert answer == bed.single[question]
    assert "x-pd-proxy-fallback" not in headers
