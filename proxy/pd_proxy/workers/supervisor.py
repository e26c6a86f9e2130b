"""The supervisor: runs several worker processes that serve as one gateway (`workers` in the settings).

The supervisor opens the sockets and forks the workers. It serves no requests itself, so no request can make it fail.
All workers accept connections from the same sockets. When one dies, its own streams are lost, but no connection that
waits to be accepted and no stream of another worker. It is replaced at once, or after a delay where it had just
started.

The supervisor passes a signal to shut down on to every worker, and each shuts down like a gateway of one process. A
worker whose supervisor has died shuts down too, since nothing would replace it.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import FrameType

from pd_proxy.runtime.signals import IGNORED, LEAVING, ignore, log_ignored
from pd_proxy.runtime.sockets import Listener, notify
from pd_proxy.telemetry.logs import name_worker
from pd_proxy.workers.context import WorkerContext
from pd_proxy.workers.load_table import LoadTable
from pd_proxy.workers.metrics_merge import counts_of, merge, parse, render
from pd_proxy.workers.peers import departed_page, page_of, write
from pd_proxy.workers.prefix_ring import PrefixRings

log = logging.getLogger("pd_proxy")

_PR_SET_PDEATHSIG = 1
_FIRST_WAIT = 0.1  # seconds before the second replacement of a worker that dies soon after its start; doubled each time
_LONGEST_WAIT = 5.0
_STABLE = 10.0  # seconds; a worker that has lived for as long is replaced at once
_TICK = 0.5  # seconds after which the loop goes round without a signal too


def supervise(workers: int, listeners: list[Listener], work: Callable[[WorkerContext], int]) -> int:
    """Run workers until a signal ends them. Returns the exit status.

    Arguments:
        listeners: the sockets that the workers serve.
        work: runs a worker in its process, and returns its exit status.
    """
    directory = Path(tempfile.mkdtemp(prefix="pd-proxy-"))  # closed to other users
    try:
        return _Supervisor(workers, listeners, work, directory).run()
    finally:
        if not _in_worker:
            shutil.rmtree(directory, ignore_errors=True)


_in_worker = False


class _Supervisor:
    """Forks the workers, and replaces those that die."""

    def __init__(
        self, workers: int, listeners: list[Listener], work: Callable[[WorkerContext], int], directory: Path
    ) -> None:
        self._count = workers
        self._listeners = listeners
        self._work = work
        self._directory = directory
        self._load_table = LoadTable(workers)
        self._prefixes = PrefixRings(workers)
        self._alive: dict[int, tuple[int, float]] = {}  # process id: the worker's number, and when it was forked
        self._waits = [0.0] * workers
        self._due: dict[int, float] = {}  # worker's number: when its replacement is forked
        self._ready = os.pipe()
        self._leaving = False
        self._unlogged: list[int] = []  # ignored signals that are not logged yet
        self._status = 0

    def run(self) -> int:
        """Run until all workers have ended. Returns the exit status."""
        wake, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(self._ready[0], False)
        for number in LEAVING:
            signal.signal(number, self._signalled)
        for number in IGNORED:
            signal.signal(number, self._record_signal)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # with a handler, it writes to the pipe below
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # memory pages that no collection writes to stay shared with the workers
        for worker in range(self._count):
            self._start(worker)
        waiting = self._count
        while self._alive or (self._due and not self._leaving):
            readable, _, _ = select.select([wake, self._ready[0]], [], [], _TICK)
            if wake in readable:
                os.read(wake, 4096)
            if self._ready[0] in readable:
                waiting -= len(os.read(self._ready[0], 4096))
                if waiting == 0:
                    log.info("%d workers are listening on %s", self._count, self._listeners[0].url)
                    notify("READY=1")
            while self._unlogged:
                log_ignored(self._unlogged.pop(0))
            self._reap()
            for worker in [worker for worker, when in self._due.items() if when <= monotonic()]:
                if not self._leaving:
                    del self._due[worker]
                    self._start(worker)
        return self._status

    def _start(self, worker: int) -> None:
        process = os.fork()
        if process == 0:
            self._run_worker(worker)
        self._alive[process] = worker, monotonic()

    def _run_worker(self, worker: int) -> None:
        """Run a worker in the process that was forked for it. Ends the process."""
        global _in_worker
        _in_worker = True
        status = 1
        try:
            name_worker(worker)
            signal.set_wakeup_fd(-1)
            for number in (*LEAVING, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            ignore()
            _terminate_with(os.getppid())
            os.environ.pop("NOTIFY_SOCKET", None)
            os.close(self._ready[0])
            context = WorkerContext(
                worker, self._count, self._directory, self._load_table, self._prefixes, self._ready[1]
            )
            status = self._work(context)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            log.exception("worker %d failed", worker)
        finally:
            sys.stdout.flush()
            logging.shutdown()  # standard error is written by a thread, which may have lines left
            os._exit(status)  # skips the clean-up at exit, which is the supervisor's

    def _reap(self) -> None:
        """Clean up after workers that have ended. Schedules their replacement unless the gateway shuts down."""
        while self._alive:
            process, result = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            if process not in self._alive:
                continue
            worker, born = self._alive.pop(process)
            status = os.waitstatus_to_exitcode(result)
            self._load_table.wipe(worker)
            self._prefixes.wipe(worker)
            self._save_counts(worker)
            if self._leaving:
                self._status = self._status or abs(status)
                continue
            wait = self._waits[worker] if monotonic() - born < _STABLE else 0.0
            self._waits[worker] = min(_LONGEST_WAIT, max(_FIRST_WAIT, 2 * wait))
            self._due[worker] = monotonic() + wait
            how = f"signal {-status}" if status < 0 else f"status {status}"
            log.error("worker %d (process %d) ended with %s; another follows in %g s", worker, process, how, wait)

    def _save_counts(self, worker: int) -> None:
        """Add the counts of a worker that has ended to those of all such workers, so that counters never decrease."""
        departed = departed_page(self._directory)
        page = page_of(self._directory, worker)
        try:
            pages = [counts_of(file.read_text(encoding="utf-8")) for file in (departed, page) if file.exists()]
            write(departed, render(merge(map(parse, pages))))
            page.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            log.warning("the counts of worker %d are lost: %s", worker, error)

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        self._unlogged.append(number)  # logged later, since a signal handler may interrupt the logging of another line

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if not self._leaving:
            self._leaving = True
            notify("STOPPING=1")
            for listener in self._listeners:
                listener.socket.close()  # the workers hold it still; when they end, no connection may wait in it
        for process in self._alive:
            os.kill(process, number)


def _terminate_with(supervisor: int) -> None:
    """Have the kernel send SIGTERM to this process when its supervisor ends for any reason (prctl(2); Linux only)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        os.kill(os.getpid(), signal.SIGTERM)
