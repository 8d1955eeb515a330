"""Work shared out among processes."""
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Callable, Iterator, Optional, Sequence


def available_cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def imap_in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], num_workers: Optional[int] = None,
                      chunksize: int = 1) -> Iterator[Any]:
    """function(job) for each job, in order, as the results come.

    Args:
        function: a module's function; jobs and results travel between processes.
        num_workers: None for one process per available CPU, 0 or 1 to stay in this process.
        chunksize: jobs that travel together.
    """
    if num_workers is None:
        num_workers = available_cpus()
    if num_workers <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent)
    try:
        yield from pool.map(function, jobs, chunksize=chunksize)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run must not finish all jobs first


def _end_with_parent() -> None:
    """Let this worker process end when its parent is killed, rather than wait for jobs for ever."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
