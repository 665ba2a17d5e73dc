"""Signals that ask a run to save and stop: Ctrl-C, SIGTERM (kill, a batch system) and SIGHUP (the terminal was closed).

A signal that was ignored when the run began stays ignored. That is what nohup does to SIGHUP, and a shell script to the
Ctrl-C of what it starts in the background.
"""

import contextlib
import os
import select
import signal
import stat
import time

from minillm.runtime import gather, rank, sum_over_processes

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
FIRST_CTRL_C = b" this step is finished and saved first; another Ctrl-C ends the run at once\n"


class Interrupt:
    """Such a signal asks the training loop to save and stop after the step; a second Ctrl-C stops at once."""

    ctrl_c = False  # whether there was one in this process: a terminal sends it to a compiler too, which then fails

    def __init__(self):
        self.signal, self.asked_at, self.handlers = 0, None, {}
        for number in filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)):
            if signal.getsignal(number) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # only the main thread may set handlers
                    self.handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number, frame):
        Interrupt.ctrl_c = Interrupt.ctrl_c or number == signal.SIGINT
        # torchrun passes on a Ctrl-C that the terminal has sent to every process already: that is no second one.
        if number == signal.SIGINT and self.signal and time.monotonic() - self.asked_at > 1:
            self.close()
            signal.raise_signal(number)  # now it does what it did before the run
            return
        if number == HANGUP:
            leave_terminal()
        elif number == signal.SIGINT and not self.signal and rank() == 0:  # the step may take minutes, or be compiled
            with contextlib.suppress(OSError):
                os.write(2, FIRST_CTRL_C)  # print may not be called again while it is at work
        self.signal, self.asked_at = self.signal or number, self.asked_at or time.monotonic()

    def requested(self) -> int:
        """The number of the signal that any process got, or 0. All call this after the same steps, to stop together."""
        if not sum_over_processes(self.signal > 0):
            return 0
        leave_broken_pipes()
        return max(gather(self.signal))

    def close(self):
        """Restore the signals' handlers: from here on Ctrl-C stops at once."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by something other than Python


def leave_terminal():
    """What is printed from now on goes nowhere: a closed terminal refuses it, and that must not keep a run from saving.

    Output that goes to a file or a pipe still does.
    """
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it was closed before
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                _send_nowhere(descriptor)


def leave_broken_pipes():
    """The same for a pipe that nobody reads any more: the Ctrl-C that asks a run to stop ends the `tee` behind it."""
    if hasattr(select, "poll"):  # Windows has none, and ends nothing so
        for descriptor in (1, 2):
            poll = select.poll()
            poll.register(descriptor, 0)  # errors are reported unasked
            if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
                _send_nowhere(descriptor)


def _send_nowhere(descriptor: int):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
