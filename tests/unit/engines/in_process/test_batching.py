import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from cocktail_serve.engines.in_process import batching
from cocktail_serve.engines.in_process.batching import (
    BACKGROUND_EVERY,
    CONTENDED_SHARE,
    Batch,
    BatchQueue,
    ForwardJob,
    PassLimits,
    ThreadCall,
    cut_by_length,
)

LIMITS = PassLimits(max_tokens=64, pass_tokens=8)


def job(lengths: list[int], *, key: str = "a", background: bool = False, tenant: str = "t") -> ForwardJob:
    made = ForwardJob(background=background, tenant=tenant)
    made.set_inputs(key, [[1] * length for length in lengths])
    return made


def queue_of(*jobs: ForwardJob, limits: PassLimits = LIMITS) -> BatchQueue[ForwardJob]:
    queue: BatchQueue[ForwardJob] = BatchQueue(limits)
    for each in jobs:
        assert queue.put(each)
    return queue


def take(queue: BatchQueue[ForwardJob]) -> Batch[ForwardJob]:
    batch = queue.take()
    assert isinstance(batch, Batch)
    return batch


def drain(queue: BatchQueue[ForwardJob], num_inputs: int) -> list[Batch[ForwardJob]]:
    batches = []
    while num_inputs:
        batches.append(take(queue))
        num_inputs -= len(batches[-1].token_ids)
    return batches


def num_padded(batch: Batch[ForwardJob]) -> int:
    lengths = [len(ids) for ids in batch.token_ids]
    return max(lengths) * len(lengths)


class TestCutByLength:
    def test_fills_a_pass_with_equal_lengths(self) -> None:
        assert cut_by_length([16] * 9, LIMITS) == [4, 8, 9]

    def test_a_single_longer_input_has_its_own_pass(self) -> None:
        assert cut_by_length([200, 100, 10, 10], LIMITS) == [1, 2, 4]

    def test_padding_dearer_than_a_pass_cuts(self) -> None:
        assert cut_by_length([20, 13, 12], LIMITS) == [2, 3]  # 7 tokens of padding are worth it, 15 are not

    def test_nothing_to_cut(self) -> None:
        assert cut_by_length([], LIMITS) == []

    @pytest.mark.parametrize("seed", range(20))
    def test_keeps_its_bounds(self, seed: int) -> None:
        rng = random.Random(seed)
        lengths = sorted((rng.randint(1, 80) for _ in range(rng.randint(1, 100))), reverse=True)
        start = 0
        for end in cut_by_length(lengths, LIMITS):
            group = lengths[start:end]
            assert len(group) == 1 or len(group) * group[0] <= LIMITS.max_tokens
            assert sum(group[0] - length for length in group) <= LIMITS.pass_tokens
            start = end
        assert start == len(lengths)


class TestBatchQueue:
    def test_joins_callers_of_one_key(self) -> None:
        first, second = job([5]), job([6, 5])
        batch = take(queue_of(first, second))
        assert dict(batch.entries) == {first: [0], second: [0, 1]}

    def test_never_joins_keys(self) -> None:
        batches = drain(queue_of(job([5], key="a"), job([5], key="b"), job([5], key="a")), 3)
        assert [(batch.key, len(batch.token_ids)) for batch in batches] == [("a", 2), ("b", 1)]

    def test_vectors_come_back_in_the_order_of_the_inputs(self) -> None:
        rng = random.Random(0)
        jobs = [job([rng.randint(1, 60) for _ in range(rng.randint(1, 40))]) for _ in range(10)]
        for number, each in enumerate(jobs):  # each input is told apart by its first token
            each.set_inputs("a", [[1000 * number + index, *ids[1:]] for index, ids in enumerate(each.token_ids)])
        complete: list[ForwardJob] = []
        for batch in drain(queue_of(*jobs), sum(len(each.token_ids) for each in jobs)):
            complete += batch.store(np.array([[ids[0], len(ids)] for ids in batch.token_ids], dtype=np.float32))
        assert set(complete) == set(jobs)
        assert len(complete) == len(jobs)
        for each in jobs:
            np.testing.assert_array_equal(each.vectors, [[ids[0], len(ids)] for ids in each.token_ids])

    def test_splits_a_large_request_within_the_bounds(self) -> None:
        rng = random.Random(1)
        large = job([rng.randint(1, 30) for _ in range(2048)])
        batches = drain(queue_of(large), 2048)
        assert all(num_padded(batch) <= LIMITS.max_tokens for batch in batches)
        read = sum(len(ids) for ids in large.token_ids)
        assert sum(map(num_padded, batches)) < 1.1 * read

    def test_a_small_request_does_not_wait_for_a_large_one(self) -> None:
        queue = queue_of(large := job([60] * 50))
        assert [each for each, _ in take(queue).entries] == [large]
        queue.put(small := job([5]))
        assert small in [each for batch in (take(queue), take(queue)) for each, _ in batch.entries]

    def test_keys_take_turns(self) -> None:
        queue = queue_of(job([60] * 10, key="a"), job([60] * 10, key="b"))
        assert [take(queue).key for _ in range(6)] == ["a", "b", "a", "b", "a", "b"]

    def test_background_gives_way_but_is_not_starved(self) -> None:
        queue = queue_of(job([60] * 10, background=True), job([60] * 100))
        order = [take(queue).jobs[0].background for _ in range(2 * BACKGROUND_EVERY)]
        assert order == ([False] * (BACKGROUND_EVERY - 1) + [True]) * 2

    def test_background_runs_at_once_when_there_is_no_traffic(self) -> None:
        assert take(queue_of(job([5], background=True))).jobs[0].background

    def test_an_abandoned_job_is_dropped_before_it_starts(self) -> None:
        gone, there = job([5]), job([6])
        queue = queue_of(gone, there)
        gone.abandoned = True
        assert take(queue).jobs == [there]

    def test_a_failed_job_is_dropped_half_way(self) -> None:
        queue = queue_of(failed := job([60] * 3), there := job([60]))
        assert take(queue).jobs == [failed]
        failed.error = RuntimeError()
        assert take(queue).jobs == [there]

    def test_calls_go_first(self) -> None:
        queue = queue_of(job([5]))
        (future,) = queue.call_each([lambda: 7])
        call = queue.take()
        assert isinstance(call, ThreadCall)
        call.run()
        assert future.result(timeout=0) == 7

    def test_each_taker_gets_its_own_call(self) -> None:
        queue: BatchQueue[ForwardJob] = BatchQueue(LIMITS, num_takers=2)
        futures = queue.call_each([lambda: "first", lambda: "second"])
        for taker in (1, 0):
            call = queue.take(taker)
            assert isinstance(call, ThreadCall)
            call.run()
        assert [future.result(timeout=0) for future in futures] == ["first", "second"]

    def test_a_call_that_fails_says_so_to_who_asked(self) -> None:
        queue = queue_of()
        (future,) = queue.call_each([lambda: 1 / 0])
        call = queue.take()
        assert isinstance(call, ThreadCall)
        call.run()
        assert isinstance(future.exception(timeout=0), ZeroDivisionError)

    def test_close_returns_what_is_left_and_ends_take(self) -> None:
        traffic, background = job([5]), job([5], background=True)
        queue = queue_of(traffic, background)
        (future,) = queue.call_each([lambda: None])
        assert set(queue.close()) == {traffic, background}
        assert queue.take() is None
        assert future.cancelled()
        assert not queue.put(job([5]))
        assert queue.call_each([lambda: None])[0].cancelled()

    def test_wakes_a_waiting_taker(self) -> None:
        queue: BatchQueue[ForwardJob] = BatchQueue(LIMITS)
        taken: list[object] = []
        thread = threading.Thread(target=lambda: taken.append(queue.take()))
        thread.start()
        queue.put(job([5]))
        thread.join(timeout=10)
        assert isinstance(taken[0], Batch)

    def test_every_input_is_taken_once_under_concurrent_puts(self) -> None:
        queue: BatchQueue[ForwardJob] = BatchQueue(LIMITS)
        rng = random.Random(2)
        jobs = [job([rng.randint(1, 70) for _ in range(20)], key=rng.choice("abc")) for _ in range(60)]
        threads = [
            threading.Thread(target=lambda part=part: [queue.put(each) for each in part])
            for part in (jobs[:30], jobs[30:])
        ]
        for thread in threads:
            thread.start()
        seen = [(each, index) for batch in drain(queue, 1200) for each, indices in batch.entries for index in indices]
        for thread in threads:
            thread.join()
        assert len(seen) == len(set(seen)) == 1200


class TestTenants:
    def test_the_tenant_served_least_is_next(self) -> None:
        queue = queue_of(*(job([60], tenant="flood") for _ in range(20)))
        take(queue)
        mine = job([10], tenant="one")
        queue.put(mine)
        assert take(queue).jobs == [mine]

    def test_a_flood_of_requests_and_recipes_is_served_half_of_the_tokens(self) -> None:
        queue = queue_of(
            *(job([16], key=f"recipe {number % 5}", tenant="flood") for number in range(200)),
            *(job([16, 16], tenant="one") for _ in range(20)),
        )
        served: Counter[str] = Counter()
        for _ in range(40):
            for each, indices in take(queue).entries:
                served[each.tenant] += len(indices)
        assert served["one"] == pytest.approx(served["flood"], abs=4)

    def test_passes_are_smaller_while_several_tenants_ask(self) -> None:
        queue = queue_of(*(job([8], tenant="flood") for _ in range(20)))
        assert len(take(queue).token_ids) == 8
        queue.put(job([8], tenant="one"))
        assert len(take(queue).token_ids) == 64 // CONTENDED_SHARE // 8
        assert len(take(queue).token_ids) == 64 // CONTENDED_SHARE // 8

    def test_tenants_of_one_recipe_share_a_pass_with_the_one_whose_turn_it_is_in_it(self) -> None:
        limits = PassLimits(max_tokens=CONTENDED_SHARE * 32, pass_tokens=8)
        queue = queue_of(job([8], tenant="a"), job([8], tenant="b"), limits=limits)
        assert {each.tenant for each in take(queue).jobs} == {"a", "b"}


class TestGathering:
    """Two threads compute; the first is busy."""

    @pytest.fixture
    def queue(self, monkeypatch: pytest.MonkeyPatch) -> BatchQueue[ForwardJob]:
        monkeypatch.setattr(batching, "GATHER_S", 30.0)
        queue: BatchQueue[ForwardJob] = BatchQueue(LIMITS, num_takers=2)
        queue.put(job([2]))
        assert isinstance(queue.take(0), Batch)  # nobody computes: at once
        return queue

    @pytest.fixture
    def second(self, queue: BatchQueue[ForwardJob]) -> Iterator[Future[Batch[ForwardJob] | ThreadCall | None]]:
        queue.put(job([2]))
        with ThreadPoolExecutor(1) as thread:
            taking = thread.submit(queue.take, 1)
            with pytest.raises(TimeoutError):
                taking.result(0.05)
            yield taking
            queue.close()

    def test_a_few_tokens_wait_for_company(
        self, queue: BatchQueue[ForwardJob], second: Future[Batch[ForwardJob]]
    ) -> None:
        queue.put(job([3]))
        with pytest.raises(TimeoutError):
            second.result(0.05)
        queue.put(job([3]))
        assert sorted(map(len, second.result(10).token_ids)) == [2, 3, 3]

    def test_whose_caller_has_gone_is_no_company(
        self, queue: BatchQueue[ForwardJob], second: Future[Batch[ForwardJob]]
    ) -> None:
        gone = job([3] * 20)
        gone.abandoned = True
        queue.put(gone)
        with pytest.raises(TimeoutError):
            second.result(0.05)

    def test_not_once_nobody_computes(self, queue: BatchQueue[ForwardJob], second: Future[Batch[ForwardJob]]) -> None:
        assert isinstance(queue.take(0), Batch)
        queue.put(job([20]))
        assert isinstance(second.result(10), Batch)

    def test_calls_do_not_wait(self, queue: BatchQueue[ForwardJob], second: Future[Batch[ForwardJob]]) -> None:
        queue.call_each([lambda: None, lambda: None])
        assert isinstance(second.result(10), ThreadCall)

    def test_many_tokens_never_wait(self, queue: BatchQueue[ForwardJob]) -> None:
        queue.put(job([1] * 1000))
        assert isinstance(queue.take(1), Batch)

    def test_no_longer_than_is_worth_it(self, queue: BatchQueue[ForwardJob], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batching, "GATHER_S", 0.01)
        queue.put(job([2]))
        assert isinstance(queue.take(1), Batch)


def test_what_one_thread_leaves_wakes_another() -> None:
    queue: BatchQueue[ForwardJob] = BatchQueue(LIMITS, num_takers=2, overtakes=True)
    with ThreadPoolExecutor(2) as threads:
        taking = [threads.submit(queue.take, taker) for taker in range(2)]
        while len(queue._condition._waiters) < 2:  # type: ignore[attr-defined]
            time.sleep(0.001)
        queue.put(job([60] * 3))  # a pass each
        try:
            assert all(isinstance(each.result(10), Batch) for each in taking)
        finally:
            queue.close()


class TestFloods:
    """Two threads compute, and a third may overtake them. A tenant floods."""

    @pytest.fixture
    def queue(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchQueue[ForwardJob]]:
        monkeypatch.setattr(batching, "HOLD_S", 30.0)
        queue: BatchQueue[ForwardJob] = BatchQueue(LIMITS, num_takers=2, overtakes=True)
        for _ in range(20):
            queue.put(job([60], tenant="flood"))
        yield queue
        queue.close()

    @pytest.fixture
    def threads(self, queue: BatchQueue[ForwardJob]) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(3) as threads:
            yield threads
            queue.close()  # before the executor waits for those that take

    def take(self, queue: BatchQueue[ForwardJob], taker: int) -> set[str]:
        batch = queue.take(taker)
        assert isinstance(batch, Batch)
        for each in batch.jobs:
            each.num_missing = 0
        return {each.tenant for each in batch.jobs}

    def test_a_tenant_overtakes_the_passes_of_another(self, queue: BatchQueue[ForwardJob]) -> None:
        assert [self.take(queue, taker) for taker in (0, 1)] == [{"flood"}, {"flood"}]
        queue.put(job([5], tenant="one"))
        assert self.take(queue, 2) == {"one"}

    def test_the_flood_overtakes_nobody(self, queue: BatchQueue[ForwardJob], threads: ThreadPoolExecutor) -> None:
        self.take(queue, 0), self.take(queue, 1)
        third = threads.submit(self.take, queue, 2)
        queue.put(job([60], tenant="flood"))
        with pytest.raises(TimeoutError):
            third.result(0.05)
        queue.put(job([5], tenant="one"))
        assert third.result(10) == {"one"}

    def test_nobody_overtakes_while_a_thread_is_free(
        self, queue: BatchQueue[ForwardJob], threads: ThreadPoolExecutor
    ) -> None:
        self.take(queue, 0)
        third = threads.submit(self.take, queue, 2)
        queue.put(job([5], tenant="one"))
        with pytest.raises(TimeoutError):
            third.result(0.05)
        queue.put(job([5], key="b", tenant="two"))
        first = self.take(queue, 1)
        assert first | third.result(10) == {"one", "two"}  # the last free thread has woken it

    def test_a_tenant_has_one_pass_that_overtakes_and_it_is_small(
        self, queue: BatchQueue[ForwardJob], threads: ThreadPoolExecutor
    ) -> None:
        self.take(queue, 0), self.take(queue, 1)
        queue.put(job([8] * 20, tenant="one"))
        batch = queue.take(2)
        assert isinstance(batch, Batch)
        assert len(batch.token_ids) == 64 // CONTENDED_SHARE // 8
        assert self.take(queue, 0) == {"one"}
        third = threads.submit(self.take, queue, 2)
        with pytest.raises(TimeoutError):
            third.result(0.05)

    def test_a_thread_is_kept_for_the_next_request_of_a_tenant_who_is_behind(
        self, queue: BatchQueue[ForwardJob], threads: ThreadPoolExecutor
    ) -> None:
        assert self.take(queue, 0) == {"flood"}
        queue.put(job([5], tenant="one"))
        assert self.take(queue, 1) == {"one"}
        second = threads.submit(self.take, queue, 1)
        with pytest.raises(TimeoutError):
            second.result(0.05)
        queue.put(job([5], tenant="one"))
        assert second.result(10) == {"one"}

    def test_a_thread_is_kept_while_the_tenant_overtakes(
        self, queue: BatchQueue[ForwardJob], threads: ThreadPoolExecutor
    ) -> None:
        self.take(queue, 0), self.take(queue, 1)
        queue.put(job([5], tenant="one"))
        assert self.take(queue, 2) == {"one"}
        second = threads.submit(self.take, queue, 1)
        with pytest.raises(TimeoutError):
            second.result(0.05)

    def test_only_one_is_kept(self, queue: BatchQueue[ForwardJob]) -> None:
        self.take(queue, 0)
        queue.put(job([5], tenant="one"))
        assert self.take(queue, 1) == {"one"}
        assert self.take(queue, 0) == {"flood"}  # the other goes on with the flood

    def test_none_is_kept_while_somebody_waits_for_whom_nobody_computes(self, queue: BatchQueue[ForwardJob]) -> None:
        self.take(queue, 0)
        queue.put(job([5], tenant="one"))
        assert self.take(queue, 1) == {"one"}
        queue.put(job([50], tenant="other"))
        assert self.take(queue, 1) == {"other"}

    def test_none_is_kept_for_long(self, queue: BatchQueue[ForwardJob], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batching, "HOLD_S", 0.01)
        self.take(queue, 0)
        queue.put(job([5], tenant="one"))
        assert self.take(queue, 1) == {"one"}
        assert self.take(queue, 1) == {"flood"}

    def test_none_is_kept_for_a_tenant_that_is_not_behind(self, queue: BatchQueue[ForwardJob]) -> None:
        self.take(queue, 0)
        queue.put(job([64], tenant="one"))
        assert self.take(queue, 1) == {"one"}
        assert self.take(queue, 1) == {"flood"}
