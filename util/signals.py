"""Signals that ask a training to save or to stop. They are heard at once and answered at the end of a step."""
import signal
import threading
import time
from typing import Any, Dict, Mapping, Optional

from util import early_signals
from util.distributed import all_gather, is_main_process
from util.errors import Stopped

SAVE, STOP = "save", "stop"
REACTIONS = {signal.SIGTERM: STOP, signal.SIGUSR1: STOP, signal.SIGINT: STOP}
OF_RUNS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
IMPATIENT_AFTER_S = 2.0  # a Ctrl-C may reach a process twice at once, by its terminal and by its launcher


class SignalListener:
    """Remembers, while it is entered, which signals came to this process.

    A second Ctrl-C, some seconds after the first, interrupts as ever.

    Args:
        reactions: what each signal asks for, SAVE (and go on) or STOP (saved).

    Attributes:
        save, stop: whether it was asked for.
        heard: name of the last signal.
    """

    def __init__(self, reactions: Mapping[int, str] = REACTIONS) -> None:
        self.reactions = dict(reactions)
        self.save = self.stop = False
        self.heard = ""
        self._first_interrupt: Optional[float] = None
        self._previous: Dict[int, Any] = {}

    def __enter__(self) -> "SignalListener":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._previous = {number: signal.signal(number, self._hear) for number in self.reactions}
            early_signals.release()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        self.heard = signal.Signals(number).name
        if self.reactions[number] == SAVE:
            self.save = True
        else:
            self.stop = True
        if number == signal.SIGINT:
            now = time.monotonic()
            self._first_interrupt = self._first_interrupt or now
            if now - self._first_interrupt > IMPATIENT_AFTER_S:
                raise KeyboardInterrupt

    def anyone_stops(self) -> bool:
        """Whether any process was asked to stop; every process must call this."""
        return any(all_gather(self.stop))

    def end_if_stopped(self) -> None:
        """Before the first step of a run: end it if any process was asked to stop; every process must call this.

        Raises:
            Stopped: with the line that says so.
        """
        if self.anyone_stops():
            raise Stopped(f"stopped by {self.heard or 'a signal to another process'} before the first step: nothing new was "
                          "trained, --resume auto goes on" if is_main_process() else "")


class UntilStopped:
    """A loader for an evaluation that ends early when a signal asks for a stop.

    Processes may have different numbers of batches; they agree at the end. `on_stop` is then called by all of them if any
    was asked to stop, and must raise.
    """

    def __init__(self, loader: Any, listener: SignalListener, on_stop: Any) -> None:
        self.loader, self.listener, self.on_stop = loader, listener, on_stop
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        for batch in self.loader:
            if self.listener.stop:
                break
            yield batch
        if self.listener.anyone_stops():
            self.on_stop()


def shield_worker(worker: int) -> None:
    """Keep signals meant for a training from its loading processes, to which terminals and Slurm send them as well: one
    that such a signal ends would end the training before it has saved. For `DataLoader`'s `worker_init_fn`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_RUNS)
