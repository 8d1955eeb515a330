"""Holds signals that ask a training to stop while the program's imports go on; imports nothing of torch itself.

`main.py` holds them first of all; `util.signals.SignalListener` releases them once it hears them, so that they end a run
that is just starting with the same line and status as later. Ctrl-C isn't held.
"""
import signal

HELD = (signal.SIGTERM, signal.SIGUSR1)


def hold() -> None:
    """Let signals wait, from now on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release() -> None:
    """Let signals that wait, and later ones, be delivered."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
