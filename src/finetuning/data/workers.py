"""Work on many items by several processes, in order."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from finetuning.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

WAITING = 2  # items for each process that are in work or done, and not yet taken


def map_in_order(
    work: Callable[[Item], Result], items: Iterator[Item], processes: int
) -> Iterator[Result]:
    """work(item) of each item, in order; of all the items only a few are in memory.

    A single item is worked on here: starting processes takes longer. Raises UserError where a
    process is killed.
    """
    first = list(islice(items, 2))
    if processes == 1 or len(first) < 2:
        yield from map(work, chain(first, items))
        return
    # Forked, as `datasets` does: they have the tokenizer without a copy or an import.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(processes, context, start_worker, (work,))
    results: deque[Future[Result]] = deque()
    try:
        for item in chain(first, items):
            results.append(pool.submit(work_here, item))
            if len(results) > WAITING * processes:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} processes that prepare rows was killed, which the system does "
            "where memory runs out; fewer take less: data.num_proc=1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


work_of_this_process: Callable[[Any], Any]


def start_worker(work: Callable[[Any], Any]) -> None:
    global work_of_this_process
    gc.freeze()  # or collecting writes to, and so copies, every page that is shared with the parent
    work_of_this_process = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for each process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the process that waits ends them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """The pool's processes would wait for work for ever when their parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work_here(item: Any) -> Any:
    return work_of_this_process(item)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
