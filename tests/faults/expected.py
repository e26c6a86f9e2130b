"""The expected result of every cell, as data.

A cell reads `ok 2P 2D`: the client's answer equals that of a fault-free run, and two prefill and two decode legs
reached an engine (a request without a fault costs 1P 1D). Other letters: `1L`, a decode leg that computed the prompt
itself; `1R`, a leg that claimed a hand-off only to have its blocks freed. `lease`: prefill's blocks stayed pinned
until the engine's own lease on them ended. `404 NotFoundError`: the client was given that error. `-a`: not run, for the
reason `a` of `REASONS`. The two endpoints are to behave alike, streams and answers in one piece need not.
"""

from __future__ import annotations

from tests.faults.cells import FAULTS, STAGES, Cell

# Two lines each: before decode's engine has the leg (connect, prefill; prefill; between, prefill; connect, decode;
# between, decode), and after (headers; role; first; middle; last).
STREAMED = {
    "kill": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 2D 1R       | ok 1P 1D          | ok 2P 1D lease
      | ok 2P 2D lease    | ok 2P 2D lease    | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "kill pair": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 1D          | -k                | -k
      | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "hang": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 2D 1R lease | ok 1P 1D          | -p
      | ok 2P 2D lease    | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "reset": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 2D 1R       | ok 1P 1D          | ok 2P 1D lease
      | ok 2P 2D lease    | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "500": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D 1R       | -d                | -d                | -d                | -d""",
    "503": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D 1R       | -d                | -d                | -d                | -d""",
    "429": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 1P 2D          | -d                | -d                | -d                | -d""",
    "garbage": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D lease    | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "garbled": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "truncated": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "error": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D 1R       | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "empty": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D lease    | ok 2P 2D 1R       | ok 2P 2D          | ok 2P 2D          | ok 1P 1D""",
    "no params": """
        -a                | ok 1P 1L lease    | -c                | -c                | -c
      | -c                | -c                | -c                | -c                | -c""",
    "expired": """
        -e                | -e                | -n                | ok 2P 1D lease    | -n
      | -f                | -f                | -l                | -l                | -l""",
    "recomputed": """
        -a                | ok 1P 1L          | -b                | -a                | -b
      | -g                | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | -h""",
    "abort": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | -h""",
    "crawl": """
        -m                | ok 1P 1D          | ok 1P 1D          | -m                | -m
      | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | -j""",
    "wrong model": """
        -a                | 404 NotFoundError 1P | -b                | -a                | -b
      | 404 NotFoundError 1P 1D | -d                | -d                | -d                | -d""",
    "clock": """
        ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | -k                | -k
      | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | ok 1P 1D""",
}
WHOLE = {
    "kill": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 2D 1R       | ok 1P 1D          | ok 2P 1D lease
      | ok 2P 2D lease    | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 2P 2D""",
    "kill pair": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 1D          | -k                | -k
      | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 2P 2D""",
    "hang": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 2D 1R lease | ok 1P 1D          | -p
      | ok 2P 2D lease    | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 2P 2D""",
    "reset": """
        ok 1P 1D          | ok 2P 1D          | ok 2P 2D 1R       | ok 1P 1D          | ok 2P 1D lease
      | ok 2P 2D lease    | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | ok 2P 2D""",
    "500": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D 1R       | -d                | -d                | -d                | -d""",
    "503": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D 1R       | -d                | -d                | -d                | -d""",
    "429": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 1P 2D          | -d                | -d                | -d                | -d""",
    "garbage": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D lease    | ok 2P 2D          | -i                | -i                | -i""",
    "garbled": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D lease    | -i                | -i                | -i""",
    "truncated": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D          | -i                | -i                | -i""",
    "error": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D 1R       | -i                | -i                | -i""",
    "empty": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | ok 2P 2D lease    | -o                | -i                | -i                | -i""",
    "no params": """
        -a                | ok 1P 1L lease    | -c                | -c                | -c
      | -c                | -c                | -c                | -c                | -c""",
    "expired": """
        -e                | -e                | -n                | ok 2P 1D lease    | -n
      | -f                | -f                | -l                | -l                | -l""",
    "recomputed": """
        -a                | ok 1P 1L          | -b                | -a                | -b
      | -g                | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | -h""",
    "abort": """
        -a                | ok 2P 1D          | -b                | -a                | -b
      | -g                | ok 2P 2D          | ok 2P 2D          | ok 2P 2D          | -h""",
    "crawl": """
        -m                | ok 1P 1D          | ok 1P 1D          | -m                | -m
      | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | -j""",
    "wrong model": """
        -a                | 404 NotFoundError 1P | -b                | -a                | -b
      | 404 NotFoundError 1P 1D | -d                | -d                | -d                | -d""",
    "clock": """
        ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | -k                | -k
      | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | ok 1P 1D          | ok 1P 1D""",
}
REASONS = {
    "a": "it needs an answer, and there is no connection yet",
    "b": "no engine is asked anything between the legs",
    "c": "the fault is in prefill's answer",
    "d": "the status has been sent by then",
    "e": "the lease begins with prefill's answer",
    "f": "decode has the hand-off by then and renews its lease. If the lease ends all the same, no engine "
    "reports it: the answer is a 200 with wrong text. The gateway prevents that only by never sending a hand-off late",
    "g": "the fault is in the body, which comes after the headers",
    "h": "a request that has ended is neither preempted nor aborted",
    "i": "an answer in one piece does not send tokens one by one: its head and its body are sent after the last token",
    "j": "no step is left to be slow",
    "k": "the same moment as in another column",
    "l": "decode has read the blocks by then, and there is no lease any more",
    "m": "the engine's kernel accepts connections, however slow the engine is",
    "n": "only a decode leg that cannot be sent in time is affected: before connect",
    "o": "the head of an answer in one piece has its length: see the column before",
    "p": "the engine's kernel accepts the leg all the same: see the next column",
}


AHEAD = {("wrong model", "headers", True): "error event stream_interrupted 1P 1D"}
"""(fault, stage, streamed) -> what is to come of it where the client has its first token from prefill; only where that
is not what comes of it otherwise."""


def _cells(row: str) -> list[str]:
    return [" ".join(cell.split()) for cell in row.split("|")]


def expected() -> dict[tuple[str, str, bool, bool], str]:
    """(fault, stage, streamed, ahead) -> what is to come of it."""
    found = {}
    for stream, table in ((True, STREAMED), (False, WHOLE)):
        assert list(table) == list(FAULTS)
        for fault, row in table.items():
            for stage, cell in zip(STAGES, _cells(row), strict=True):
                found[fault, stage, stream, False] = cell
                found[fault, stage, stream, True] = AHEAD.get((fault, stage, stream), cell)
    return found


def expected_of(cell: Cell) -> str:
    return EXPECTED[cell.fault, cell.stage, cell.stream, cell.ahead]


EXPECTED = expected()
