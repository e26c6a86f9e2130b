"""The queue of log lines, while the reader of standard error is slow, stopped or gone."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from time import monotonic, sleep, thread_time
from typing import Any

import pytest
from pd_proxy.telemetry import log_queue
from pd_proxy.telemetry.log_queue import LIMIT, LogQueue, lines_dropped, standard_error
from pd_proxy.telemetry.logs import JsonFormatter, RequestLog, TextFormatter
from pd_proxy.telemetry.records import RequestRecord

TEXT = logging.Formatter("%(message)s")


class Pipe:
    """A pipe, and the queues that write to it."""

    def __init__(self) -> None:
        self.end, self.writing = os.pipe()
        self._queues: list[LogQueue] = []
        self._open = {self.end, self.writing}

    def queue(self, formatter: logging.Formatter = TEXT, limit: int = LIMIT) -> LogQueue:
        queue = LogQueue(formatter, self.writing, limit)
        self._queues.append(queue)
        return queue

    def close(self, end: int) -> None:
        if end in self._open:
            self._open.remove(end)
            os.close(end)

    def read(self) -> bytes:
        """All data that was written. Ends the writing."""
        found = b""
        self.close(self.writing)
        while piece := os.read(self.end, 65536):
            found += piece
        return found

    def put_away(self) -> None:
        self.close(self.end)  # a thread that waits for its reader ends
        for queue in self._queues:
            queue.close()
            if queue._thread is not None:
                queue._thread.join(20)
        self.close(self.writing)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.put_away()


def line(text: str, *args: Any) -> logging.LogRecord:
    return logging.LogRecord("pd_proxy.x", logging.INFO, __file__, 1, text, args, None)


def written(queue: LogQueue) -> None:
    """Wait until all lines of a queue are written or dropped. `flush` gives up sooner, as a process that ends has to,
    and on a busy machine the reader may not have run by then."""
    end = monotonic() + 30
    while queue._done < queue._put:
        assert monotonic() < end, "the queue's lines are not written"
        sleep(0.002)


class Reader(threading.Thread):
    """Reads a pipe to its end."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(daemon=True)
        self.pipe = pipe
        self.found = b""
        self.start()

    def run(self) -> None:
        while piece := os.read(self.pipe.end, 65536):
            self.found += piece

    def lines(self) -> list[str]:
        """All data that was written. Ends the writing."""
        self.pipe.close(self.pipe.writing)
        self.join(20)
        assert not self.is_alive()
        return self.found.decode().splitlines()


def test_lines_are_written_in_order(pipe: Pipe) -> None:
    queue = pipe.queue()
    reader = Reader(pipe)
    for number in range(5000):
        queue.handle(line("%d %s", number, "x" * (number % 300)))
    written(queue)
    assert reader.lines() == [f"{number} {'x' * (number % 300)}" for number in range(5000)]
    assert queue.dropped == 0


def test_a_flush_waits_for_lines_that_can_be_written(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_queue, "_NO_READER", 30.0)  # longer than any stall of this machine
    monkeypatch.setattr(log_queue, "_LAST_WORDS", 30.0)
    queue = pipe.queue()
    queue.handle(line("x"))
    queue.flush()  # the pipe has room for it
    assert queue._done == queue._put
    assert pipe.read() == b"x\n"


def test_a_line_longer_than_a_pipe_is_written_whole(pipe: Pipe) -> None:
    queue = pipe.queue()
    reader = Reader(pipe)
    texts = ["a" * 300_000, "b", "c" * 5000, "d"]
    for text in texts:
        queue.handle(line(text))
    written(queue)
    assert reader.lines() == texts


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
@pytest.mark.slow
def test_ten_thousand_lines_a_second_into_an_unread_pipe_delay_nothing(
    pipe: Pipe, formatter: logging.Formatter
) -> None:
    queue = pipe.queue(formatter, limit=LIMIT // 2)
    logger = logging.getLogger("pd_proxy.request")
    before = logger.level, logger.propagate
    logger.addHandler(queue)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    used: list[float] = []

    def write() -> None:
        sink = RequestLog(every=True)
        record = RequestRecord(
            "chat", "a-request-id", "model", decode="http://decode:8000", prefill="http://prefill:8000", tokens=70
        )
        record.status, record.outcome, record.ended = 200, "ok", record.started + 1
        began = thread_time()
        for _ in range(20_000):
            sink.finished(record)
        used.append(thread_time() - began)

    try:
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(60)
        assert not writer.is_alive(), "a pipe that nobody reads has stopped the thread that logs"
    finally:
        logger.removeHandler(queue)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    assert used[0] < 2.0, "10,000 lines take more than a second of CPU"
    assert queue.dropped > 0
    assert lines_dropped() >= queue.dropped
    ending = threading.Thread(target=queue.flush, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive(), "the process could not end"


def test_waiting_lines_are_bounded_in_bytes_and_a_late_reader_learns_how_many_were_dropped(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_queue, "_AGAIN", 0.0)  # the writer may run while lines are being dropped
    queue = pipe.queue(limit=200_000)
    for number in range(1000):
        queue.handle(line("%04d " + "x" * 994, number))
    kept = 1000 - queue.dropped
    assert 200 <= kept <= 300  # the lines of the queue, and those that the pipe itself holds
    reader = Reader(pipe)
    written(queue)
    queue.handle(line("and on it goes"))
    written(queue)
    lines = reader.lines()
    told = [text for text in lines if "dropped" in text]
    assert sum(int(number) for text in told for number in re.findall(r"\d+", text)) == queue.dropped > 0
    found = [int(text[:4]) for text in lines if "xxx" in text]
    assert found == sorted(found)
    assert len(found) == kept
    assert lines[-1] == "and on it goes"


def test_a_reader_that_has_gone_raises_no_error(pipe: Pipe) -> None:
    queue = pipe.queue()
    pipe.close(pipe.end)
    for _ in range(10):
        queue.handle(line("nobody hears it"))
    written(queue)
    assert queue.dropped == 10


def test_without_a_standard_error_nothing_is_written_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert standard_error() is None
    queue = LogQueue(TEXT, standard_error())
    queue.handle(line("to nobody"))
    written(queue)
    assert queue.dropped == 1


def test_a_pipe_in_non_blocking_mode_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.writing, False)
    queue = pipe.queue()
    for number in range(200):
        queue.handle(line("%03d " + "x" * 996, number))  # three times what the pipe holds
    reader = Reader(pipe)
    written(queue)
    assert [int(text[:3]) for text in reader.lines()] == list(range(200))


def test_a_line_that_cannot_be_formatted_is_counted_and_raises_nothing(
    pipe: Pipe, capfd: pytest.CaptureFixture[str]
) -> None:
    queue = pipe.queue()
    queue.handle(line("%d", "no number"))
    assert queue.dropped == 1
    queue.handle(line("\ud800 is no character"))
    written(queue)
    assert pipe.read() == b"\\ud800 is no character\n"
    assert capfd.readouterr().err == ""


def test_a_json_line_holds_any_text(pipe: Pipe) -> None:
    queue = pipe.queue(JsonFormatter())
    queue.handle(line("\ud800 is no character"))
    written(queue)
    assert queue.dropped == 0
    assert b"is no character" in pipe.read()


def test_a_fork_writes_its_own_lines_and_none_of_its_parents(pipe: Pipe) -> None:
    queue = pipe.queue()
    for number in range(100):
        queue.handle(line("%02d parent " + "x" * 1000, number))  # more than the pipe holds: some wait
    child = os.fork()
    if child == 0:
        try:
            queue.handle(line("child"))
            written(queue)
        finally:
            os._exit(0 if queue.dropped == 0 else 1)
    reader = Reader(pipe)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    written(queue)
    lines = reader.lines()
    assert lines.count("child") == 1
    assert [int(text[:2]) for text in lines if "parent" in text] == list(range(100))


def test_a_queue_that_was_full_before_a_fork_is_empty_in_the_child(pipe: Pipe) -> None:
    queue = pipe.queue(limit=10_000)
    for _ in range(200):
        queue.handle(line("x" * 1000))
    assert queue.dropped
    child = os.fork()
    if child == 0:
        os._exit(queue.dropped)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_limit_is_a_second_of_lines() -> None:
    record = RequestRecord("chat", "i" * 32, "model", decode="http://decode:8000", prefill="http://prefill:8000")
    made = logging.LogRecord("pd_proxy.request", logging.INFO, __file__, 1, "%s", (record.request_id,), None)
    made.fields = {"prefill": record.prefill, "decode": record.decode, "error": "e" * 100}
    assert LIMIT / len(TextFormatter().format(made)) > 10_000
