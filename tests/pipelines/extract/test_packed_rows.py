"""Tasks in host threads: order, bound and failures."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from pipelines.extract.shard import in_threads


@pytest.mark.parametrize("ahead", [0, 1, 3, 100])
def test_results_come_group_by_group_in_order(ahead: int) -> None:
    """Results keep the order of groups and tasks, empty groups included."""
    groups = [[partial(divmod, group, k + 1) for k in range(group % 3)] for group in range(10)]
    with ThreadPoolExecutor(4) as pool:
        found = list(in_threads(pool, groups, ahead=ahead))
    assert found == [[divmod(group, k + 1) for k in range(group % 3)] for group in range(10)]


@pytest.mark.parametrize("ahead", [0, 2])
def test_no_more_groups_are_drawn_than_allowed(ahead: int) -> None:
    """When a group is yielded, exactly `ahead` further groups have been drawn from the source."""
    drawn = []

    def groups() -> Iterator[list[partial[int]]]:
        for group in range(8):
            drawn.append(group)
            yield [partial(int, group)]

    with ThreadPoolExecutor(2) as pool:
        for number, (value,) in enumerate(in_threads(pool, groups(), ahead=ahead)):
            assert value == number
            assert len(drawn) == min(8, number + 1 + ahead)


def test_a_task_runs_beside_the_caller() -> None:
    """With one group ahead, the next group's task runs while the caller uses the first group."""
    running = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        results = in_threads(pool, [[partial(int, 1)], [running.set], [partial(int, 2)]], ahead=1)
        assert next(results) == [1]
        assert running.wait(10)


def test_what_a_task_raises_reaches_the_caller_and_the_rest_is_cancelled() -> None:
    """A task's exception is raised in its group's turn, and unstarted groups are cancelled."""
    ran = []

    def fail() -> None:
        raise ValueError("no space")

    groups = [[partial(ran.append, 0)], [fail], *([partial(ran.append, n)] for n in range(1, 50))]
    with ThreadPoolExecutor(1) as pool:
        results = in_threads(pool, groups, ahead=1)
        assert next(results) == [None]
        with pytest.raises(ValueError, match="no space"):
            next(results)
    assert len(ran) <= 3
