"""docs/fault-matrix.md, from what a run of the matrix gave. No times, no ports, nothing random: each run writes the
same."""

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

For operators and contributors: what a failure of an engine looks like from outside.

What a client gets when one backend of a pool fails, by fault and by stage, with one healthy backend left in each pool.
Each cell was run for chat and for completions, against two prefill and two decode simulators over real sockets, with
greedy sampling and {TOKENS} tokens; where the two endpoints differ, both are shown. The fault sits on the pair that the
request meets first, and stays there.

**ok**: the client was given what it is given without a fault, compared with the answer of a fresh fleet to which nothing
happened: the same status, the same text event by event, the same `finish_reason` and token counts, one id, one `created`,
one role chunk (chat), one `[DONE]`, no member more or less. `cached_tokens` may differ: a prompt that is prefilled again
is found in the prefix cache.

**+1P +1D**: so many prefill and decode legs reached an engine beyond the one and one that every request costs. A leg
that no engine read (a refused connection) is none. **own prefill**: the answer came from a decode leg that computed the
prompt itself. **claim**: a hand-off nobody was going to use was claimed, so that its blocks came free.

After each cell nothing is left: no lease, hand-off, task, connection or client in the gateway; nothing running, waiting
or held on the engines, and every KV block free, within two seconds. **lease** marks the exception: decode may have begun
to read the blocks, so nobody else may touch them, and prefill's own lease on them ends first (`docs/operating.md`).
"""

_AHEAD = """
## With the first token from prefill

The cells above were run with `first_token: decode`. All were run once more with the first token from prefill
(`docs/first-token.md`): the client then has it before decode's leg is sent, and a failure from there on is made good by
a resume and not by another try. The answers are compared with the same fault-free run of decode alone. What comes of a
cell is the same, but for these:

"""

_NOTES = f"""\
## The stages

| stage | what has happened by then |
| --- | --- |
| {STAGES["connect, prefill"]} | nothing: prefill's engine has failed, and nobody knows |
| {STAGES["prefill"]} | prefill's engine has the leg and computes |
| {STAGES["between, prefill"]} | prefill has answered, its KV is pinned, decode's leg is not sent; prefill's engine fails |
| {STAGES["connect, decode"]} | the same; decode's engine failed before, and nobody knows |
| {STAGES["between, decode"]} | the same; decode's engine fails now, and the leg is written to a connection that was good |
| {STAGES["headers"]} | decode's engine has the leg and has said nothing |
| {STAGES["role"]} | status and headers are out, for chat the role as well; of an answer in one piece half the body |
| {STAGES["first"]} | the first token is out; of an answer in one piece it has been computed |
| {STAGES["middle"]} | {MIDDLE} of {TOKENS} tokens, the last of them half a character, which the engine holds back |
| {STAGES["last"]} | the `finish_reason` is out, usage and `[DONE]` are not; of an answer in one piece all is computed |

## The faults

| fault | how it is made |
| --- | --- |
| {FAULTS["kill"]} | every socket of the process is gone at once, in the same instant of the engine's step |
| {FAULTS["kill pair"]} | the same to both engines of the pair |
| {FAULTS["hang"]} | before a connection: packets go nowhere. Later: silence. `/health` answers on, except for answers in one \
piece, where nothing but `/health` tells a hung engine from a long answer |
| {FAULTS["reset"]} | connections are refused, or reset by an engine that lives on |
| {FAULTS["garbage"]} | bytes that are no HTTP: for a status line, in place of a chunk, inside a body |
| {FAULTS["garbled"]} | proper HTTP and events, but the JSON in it is broken; then `[DONE]` |
| {FAULTS["truncated"]} | the connection ends inside a chunk, or inside a body that was said to be longer |
| {FAULTS["empty"]} | a body without a byte; a stream that says `[DONE]` before its first, or before its last token |
| {FAULTS["no params"]} | prefill answers without `kv_transfer_params` |
| {FAULTS["expired"]} | decode's engine cannot be connected to until the hand-off is too old to be sent |
| {FAULTS["recomputed"]} | `stop_reason: recomputed`, as vllm-ascend's scheduler says it |
| {FAULTS["abort"]} | the engine is told to stop, and ends what runs with `finish_reason: "abort"`, status 200; 0.17 s later \
nobody listens there |
| {FAULTS["crawl"]} | every step takes a hundred times as long: the whole stream takes longer than any single timeout |
| {FAULTS["wrong model"]} | the engine has been started with another model and refuses the request; a 4xx is never retried |
| {FAULTS["clock"]} | the wall clock leaps a day, ahead or back. Nothing in the gateway reads it |
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
    parts.append("\nNot run, since it makes no sense:\n\n")
    parts += [f"- **{letter}**: {reason}\n" for letter, reason in REASONS.items()]
    return "".join([*parts, "\n", _NOTES])


def _ahead(outcomes: dict[Cell, str]) -> str:
    """What comes of the cells where the client has its first token from prefill, as far as that is something else."""
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
    notes = [word for word, there in (("own prefill", "L" in legs), ("claim", "R" in legs), ("lease", "lease" in words))
             if there]  # fmt: skip
    return ", ".join([" ".join([said, *extra]), *notes])
