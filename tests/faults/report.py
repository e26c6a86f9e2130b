"""docs/fault-matrix.md, from the results of a run of the matrix. It has no times, ports or random values, so each run
writes the same page."""

# ruff: noqa: E501, RUF001
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.faults.cells import ENDPOINTS, FAULTS, MIDDLE, STAGES, TOKENS, Cell
from tests.faults.expected import EXPECTED, REASONS

FILE = Path(__file__).parents[2] / "docs" / "fault-matrix.md"
WRITE = "WRITE_FAULT_MATRIX"

_HEAD = f"""\
<!-- Written by tests/faults/test_matrix.py. Do not edit; {WRITE}=1 .venv/bin/pytest tests/faults/test_matrix.py -->

# Fault matrix

For operators and contributors: the effect of an engine's failure on clients.

The tables show what a client gets when one backend of a pool fails, by fault and by stage, with one healthy backend left in each
pool. Each cell was run for chat and for completions, with two prefill and two decode simulators over real sockets,
greedy sampling and {TOKENS} tokens; where the two endpoints differ, both results are shown. The fault affects the pair that the
request gets first, and lasts.

**ok**: the client got the same as without a fault. The answer was compared with that of a new fleet without faults:
the same status, the same text event by event, the same `finish_reason` and token counts, one id, one `created`,
one event with the role (chat), one `[DONE]`, no member more or less. `cached_tokens` may differ, since a prompt that is prefilled
again is found in the prefix cache.

**+1P +1D**: the number of prefill and decode legs that reached an engine, beyond the two that every request has. A leg
that no engine read (a refused connection) does not count. **own prefill**: the answer came from a decode leg that computed the
prompt itself. **release**: an unused hand-off was released, which freed its blocks.

After each cell nothing is left: no lease, hand-off, task, connection or client in the gateway; nothing running, waiting
or held on the engines; and every KV block is free within two seconds. **lease** marks the exception: decode may have begun
to read the blocks, so no other request may use them, and prefill's own lease on them ends first (`docs/operating.md`).
"""

_AHEAD = """
## With the first token from prefill

The cells above were run with `first_token: decode`. All were run once more with the first token from prefill
(`docs/first-token.md`): the client then has it before decode's leg is sent, and a failure after that leads to
a resume and not to another try. The answers are compared with the same run of decode alone without a fault. The results are
the same, except for these:

"""

_NOTES = f"""\
## The stages

| stage | what has happened by then |
| --- | --- |
| {STAGES["connect, prefill"]} | nothing: prefill's engine has failed, and the gateway has not noticed |
| {STAGES["prefill"]} | prefill's engine has the leg and computes |
| {STAGES["between, prefill"]} | prefill has answered and holds its KV blocks, decode's leg is not sent; prefill's engine fails |
| {STAGES["connect, decode"]} | the same; decode's engine failed before, and the gateway has not noticed |
| {STAGES["between, decode"]} | the same; decode's engine fails now, and the leg is written to a connection that was open before |
| {STAGES["headers"]} | decode's engine has the leg and has sent nothing |
| {STAGES["role"]} | status and headers are sent, for chat the role as well; of an answer in one piece, half the body |
| {STAGES["first"]} | the first token is sent; of an answer in one piece, it has been computed |
| {STAGES["middle"]} | {MIDDLE} of {TOKENS} tokens, the last of them half a character, which the engine holds back |
| {STAGES["last"]} | the `finish_reason` is sent, usage and `[DONE]` are not; of an answer in one piece, all tokens are computed |

## The faults

| fault | how it is made |
| --- | --- |
| {FAULTS["kill"]} | every socket of the process is closed at once, in the middle of an engine's step |
| {FAULTS["kill pair"]} | the same to both engines of the pair |
| {FAULTS["hang"]} | before a connection: packets are lost. Later: silence. `/health` still answers, except for answers in one \
piece, where only `/health` tells a hung engine from a long answer |
| {FAULTS["reset"]} | connections are refused, or reset by an engine that stays alive |
| {FAULTS["garbage"]} | bytes that are not HTTP: as a status line, in place of a chunk, inside a body |
| {FAULTS["garbled"]} | correct HTTP and events with broken JSON; then `[DONE]` |
| {FAULTS["truncated"]} | the connection ends inside a chunk, or before the content-length of a body |
| {FAULTS["empty"]} | an empty body; a stream with `[DONE]` before its first or before its last token |
| {FAULTS["no params"]} | prefill answers without `kv_transfer_params` |
| {FAULTS["expired"]} | decode's engine cannot be connected to until the hand-off is too old to be sent |
| {FAULTS["recomputed"]} | `stop_reason: recomputed`, as vllm-ascend's scheduler sends it |
| {FAULTS["abort"]} | the engine is stopped, and ends running requests with `finish_reason: "abort"`, status 200; 0.17 s later \
nothing listens there |
| {FAULTS["crawl"]} | every step takes a hundred times as long: the whole stream takes longer than any single timeout |
| {FAULTS["wrong model"]} | the engine was started with another model and refuses the request; a 4xx is never retried |
| {FAULTS["clock"]} | the wall clock jumps a day, forward or back. The gateway does not read it |
"""


def render(outcomes: dict[Cell, str]) -> str:
    """The document.

    Arguments:
        outcomes: in the words of `expected.py`, of every cell that can be run.
    """
    parts = [_HEAD]
    for stream, title in ((True, "Streams"), (False, "Answers in one piece")):
        parts += [f"\n## {title}\n\n", "| fault | " + " | ".join(STAGES.values()) + " |\n"]
        parts.append("| --- " * (len(STAGES) + 1) + "|\n")
        for fault, name in FAULTS.items():
            parts.append(
                f"| {name} | " + " | ".join(_cell(outcomes, fault, stage, stream) for stage in STAGES) + " |\n"
            )
    parts.append(_ahead(outcomes))
    parts.append("\nThese combinations do not exist and were not run:\n\n")
    parts += [f"- **{letter}**: {reason}\n" for letter, reason in REASONS.items()]
    return "".join([*parts, "\n", _NOTES])


def _ahead(outcomes: dict[Cell, str]) -> str:
    """The rows of the cells whose result differs with the first token from prefill."""
    rows = []
    for cell, outcome in outcomes.items():
        before = outcomes.get(replace(cell, ahead=False))
        if cell.ahead and _shown(outcome) != (None if before is None else _shown(before)):
            shape = f"{cell.endpoint}, {'streamed' if cell.stream else 'in one piece'}"
            rows.append(f"| {FAULTS[cell.fault]} | {STAGES[cell.stage]} | {shape} | {_shown(outcome)} |\n")
    return "".join([_AHEAD, "| fault | stage | request | outcome |\n| --- | --- | --- | --- |\n", *rows])


def _cell(outcomes: dict[Cell, str], fault: str, stage: str, stream: bool) -> str:
    expected = EXPECTED[fault, stage, stream, False]
    if expected.startswith("-"):
        return f"– {expected[1:]}"
    shown = {endpoint: _shown(outcomes[Cell(fault, stage, endpoint, stream)]) for endpoint in ENDPOINTS}
    if len(set(shown.values())) == 1:
        return shown[ENDPOINTS[0]]
    return "; ".join(f"{endpoint}: {text}" for endpoint, text in shown.items())


def _shown(outcome: str) -> str:
    """`ok 2P 2D lease` as `ok +1P +1D, lease`."""
    words = outcome.split()
    legs = {word[-1]: int(word[:-1]) for word in words if word[:-1].isdigit() and word[-1] in "PDLR"}
    said = " ".join(word for word in words if word != "lease" and not (word[:-1].isdigit() and word[-1] in "PDLR"))
    prefill, decode = legs.get("P", 0) - 1, legs.get("D", 0) + legs.get("L", 0) - 1
    extra = [f"+{count}{letter}" for count, letter in ((prefill, "P"), (decode, "D")) if count > 0]
    notes = [word for word, there in (("own prefill", "L" in legs), ("release", "R" in legs), ("lease", "lease" in words))
             if there]  # fmt: skip
    return ", ".join([" ".join([said, *extra]), *notes])
