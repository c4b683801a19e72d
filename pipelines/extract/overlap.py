"""Groups of small host tasks in threads, a bounded number of groups ahead of whoever takes their results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")


def in_threads(
    pool: Executor, groups: Iterable[Sequence[Callable[[], T]]], *, ahead: int
) -> Iterator[list[T]]:
    """Run each group's tasks in `pool` and yield their results, group by group, in order.

    Groups are drawn from `groups` in the calling thread: `ahead` of them may be running or done before the one that is
    yielded next; with 0 a group is drawn, run and yielded before the next is drawn. What a task raises is raised here.
    """
    waiting: deque[list[Future[T]]] = deque()
    try:
        for group in groups:
            waiting.append([pool.submit(task) for task in group])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        for future in (future for group in waiting for future in group):
            future.cancel()
