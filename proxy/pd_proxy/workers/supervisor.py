"""Several processes that serve as one gateway: `workers` of the settings.

The supervisor opens the sockets and forks; it serves nobody itself, so nothing that a request can do ends it. All
workers accept from the same sockets: when one dies, its streams are lost with it, but no connection that waits, and no
stream of the others. Another takes its place at once, and later if it keeps dying.

A signal to leave goes to every worker, and each leaves as a gateway of one process does. A worker whose supervisor has
gone leaves likewise: nobody would replace it.
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

from pd_proxy.runtime.signals import IGNORED, LEAVING, ignore, tell_ignored
from pd_proxy.runtime.sockets import Listener, notify
from pd_proxy.telemetry.logs import name_worker
from pd_proxy.workers.context import WorkerContext
from pd_proxy.workers.load_table import LoadTable
from pd_proxy.workers.metrics_merge import counts_of, merge, parse, render
from pd_proxy.workers.peers import departed_page, page_of, write
from pd_proxy.workers.prefix_ring import PrefixRings

log = logging.getLogger("pd_proxy")

_PR_SET_PDEATHSIG = 1
_FIRST_WAIT = 0.1  # seconds before a worker that has died is replaced, unless it had lived for `_LONG`
_LONGEST_WAIT = 5.0
_LONG = 10.0
_TICK = 0.5  # seconds between looks while nothing tells


def supervise(workers: int, listeners: list[Listener], work: Callable[[WorkerContext], int]) -> int:
    """Run workers until a signal ends them. Returns the exit status.

    Arguments:
        listeners: whose sockets the workers serve.
        work: what each does; returns its exit status.
    """
    directory = Path(tempfile.mkdtemp(prefix="pd-proxy-"))  # for this user alone
    try:
        return _Supervisor(workers, listeners, work, directory).run()
    finally:
        if not _in_worker:
            shutil.rmtree(directory, ignore_errors=True)


_in_worker = False


class _Supervisor:
    """Forks workers and keeps their number."""

    def __init__(
        self, workers: int, listeners: list[Listener], work: Callable[[WorkerContext], int], directory: Path
    ) -> None:
        self._count = workers
        self._listeners = listeners
        self._work = work
        self._directory = directory
        self._load_table = LoadTable(workers)
        self._prefixes = PrefixRings(workers)
        self._alive: dict[int, tuple[int, float]] = {}  # process id: its number, and when it was made
        self._waits = [0.0] * workers
        self._due: dict[int, float] = {}  # number: when it is to be made again
        self._ready = os.pipe()
        self._leaving = False
        self._noted: list[int] = []  # signals that do nothing, not yet logged
        self._status = 0

    def run(self) -> int:
        """Until all have left."""
        wake, waker = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(self._ready[0], False)
        for number in LEAVING:
            signal.signal(number, self._signalled)
        for number in IGNORED:
            signal.signal(number, self._note)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # so that the pipe below hears of it
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()  # pages that no collection touches stay shared
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
            while self._noted:
                tell_ignored(self._noted.pop(0))
            self._reap()
            for worker in [worker for worker, when in self._due.items() if when <= monotonic()]:
                if not self._leaving:
                    del self._due[worker]
                    self._start(worker)
        return self._status

    def _start(self, worker: int) -> None:
        process = os.fork()
        if process == 0:
            self._become(worker)
        self._alive[process] = worker, monotonic()

    def _become(self, worker: int) -> None:
        """Be a worker, in the process that was forked for it."""
        global _in_worker
        _in_worker = True
        status = 1
        try:
            name_worker(worker)
            signal.set_wakeup_fd(-1)
            for number in (*LEAVING, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            ignore()
            _leave_with(os.getppid())
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
            logging.shutdown()  # standard error is written by a thread, which has some lines left
            os._exit(status)  # what the supervisor has to put in order at its end is not a worker's

    def _reap(self) -> None:
        """See which workers have ended, and have those replaced that were not to."""
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
            self._keep_counts(worker)
            if self._leaving:
                self._status = self._status or abs(status)
                continue
            wait = self._waits[worker] if monotonic() - born < _LONG else 0.0
            self._waits[worker] = min(_LONGEST_WAIT, max(_FIRST_WAIT, 2 * wait))
            self._due[worker] = monotonic() + wait
            how = f"signal {-status}" if status < 0 else f"status {status}"
            log.error("worker %d (process %d) ended with %s; another follows in %g s", worker, process, how, wait)

    def _keep_counts(self, worker: int) -> None:
        """What a worker that has ended has counted is not to be taken back."""
        departed = departed_page(self._directory)
        page = page_of(self._directory, worker)
        try:
            pages = [counts_of(file.read_text(encoding="utf-8")) for file in (departed, page) if file.exists()]
            write(departed, render(merge(map(parse, pages))))
            page.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            log.warning("the counts of worker %d are lost: %s", worker, error)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append(number)  # not logged here: a handler interrupts anything, a log line too

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if not self._leaving:
            self._leaving = True
            notify("STOPPING=1")
            for listener in self._listeners:
                listener.socket.close()  # the workers have it; nobody else shall wait in it when they are gone
        for process in self._alive:
            os.kill(process, number)


def _leave_with(supervisor: int) -> None:
    """Have this process told to leave when its supervisor has gone, however that went (prctl(2), Linux alone)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        os.kill(os.getpid(), signal.SIGTERM)
