import asyncio
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from cocktail_serve.engines.in_process.parameter_cache import ParameterCache, Params
from cocktail_serve.errors import CheckpointError, ModelNotReadyError
from cocktail_serve.recipe import Recipe

SIZE = 10


def recipe(name: str) -> Recipe:
    return Recipe(base="base", coefficients=((name, 1.0),), dtype="float32")


class Mixer:
    """Counts what is in memory, and lets a test decide when a mix or an unbinding ends."""

    def __init__(self, num_mixtures: int) -> None:
        self.mixed: list[str] = []
        self.unbound: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.cache = ParameterCache(self.mix, self.unbind, mixture_bytes=SIZE, max_bytes=num_mixtures * SIZE + SIZE - 1)

    async def mix(self, recipe: Recipe) -> Params:
        name = recipe.coefficients[0][0]
        self.mixed.append(name)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        assert len(self.mixed) - len(self.unbound) <= 2, "more mixtures in memory than the budget allows"
        return {"weight": name}

    async def unbind(self, params: Params) -> None:
        self.unbound.append(params["weight"])


@pytest_asyncio.fixture
async def mixer() -> AsyncIterator[Mixer]:
    made = Mixer(num_mixtures=2)
    yield made
    await made.cache.close()


async def settled() -> None:
    """Lets everything that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_mixes_once_for_all_who_wait(mixer: Mixer) -> None:
    mixer.gate.clear()
    leases = [asyncio.create_task(mixer.cache.lease(recipe("a"))) for _ in range(5)]
    await settled()
    mixer.gate.set()
    mixtures = await asyncio.gather(*leases)
    assert mixer.mixed == ["a"]
    assert len({id(mixture) for mixture in mixtures}) == 1
    assert mixtures[0].params == {"weight": "a"}


async def test_is_ready_only_when_mixed(mixer: Mixer) -> None:
    mixer.gate.clear()
    lease = asyncio.create_task(mixer.cache.lease(recipe("a")))
    await settled()
    assert not mixer.cache.is_ready(recipe("a").digest)
    mixer.gate.set()
    await lease
    assert mixer.cache.is_ready(recipe("a").digest)


async def test_evicts_the_least_recently_used(mixer: Mixer) -> None:
    for name in ("a", "b", "a", "c"):
        mixer.cache.release(await mixer.cache.lease(recipe(name)))
    assert mixer.unbound == ["b"]
    assert mixer.cache.is_ready(recipe("a").digest)
    assert mixer.cache.num_bytes == 2 * SIZE


async def test_never_evicts_what_is_in_use_while_something_else_is_idle(mixer: Mixer) -> None:
    held = await mixer.cache.lease(recipe("a"))
    for name in ("b", "c", "d"):
        mixer.cache.release(await mixer.cache.lease(recipe(name)))
    assert mixer.unbound == ["b", "c"]
    assert held.params == {"weight": "a"}


async def test_waits_for_a_user_when_all_are_in_use_and_keeps_newcomers_out(mixer: Mixer) -> None:
    first, second = await mixer.cache.lease(recipe("a")), await mixer.cache.lease(recipe("b"))
    third = asyncio.create_task(mixer.cache.lease(recipe("c")))
    await settled()
    assert not third.done()
    assert first.params, "in use: still there"
    newcomer = asyncio.create_task(mixer.cache.lease(recipe("a")))  # would keep "a" in use for ever
    await settled()
    assert not newcomer.done()
    mixer.cache.release(first)
    assert (await third).params == {"weight": "c"}
    mixer.cache.release(second)
    assert (await newcomer).params == {"weight": "a"}
    assert mixer.mixed == ["a", "b", "c", "a"]


async def test_a_mixture_still_being_mixed_can_make_room_once_it_is(mixer: Mixer) -> None:
    mixer.gate.clear()
    leases = [asyncio.create_task(mixer.cache.lease(recipe(name))) for name in "abc"]
    await settled()
    mixer.gate.set()
    async with asyncio.timeout(10):
        for lease in leases:
            mixer.cache.release(await lease)
    assert mixer.mixed == ["a", "b", "c"]


async def test_a_failed_mix_reaches_all_who_wait_and_is_tried_again(mixer: Mixer) -> None:
    mixer.error = CheckpointError("broken")
    results = await asyncio.gather(*(mixer.cache.lease(recipe("a")) for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [CheckpointError, CheckpointError]
    assert mixer.cache.num_bytes == 0
    mixer.error = None
    assert (await mixer.cache.lease(recipe("a"))).params == {"weight": "a"}


async def test_forget_frees_after_the_last_user(mixer: Mixer) -> None:
    held = await mixer.cache.lease(recipe("a"))
    mixer.cache.forget(held.digest)
    await settled()
    assert mixer.unbound == []
    assert not mixer.cache.is_ready(held.digest)
    mixer.cache.release(held)
    await settled()
    assert mixer.unbound == ["a"]
    assert mixer.cache.num_bytes == 0


async def test_forget_while_mixing_serves_who_waits_and_frees_then(mixer: Mixer) -> None:
    mixer.gate.clear()
    lease = asyncio.create_task(mixer.cache.lease(recipe("a")))
    await settled()
    mixer.cache.forget(recipe("a").digest)
    mixer.gate.set()
    mixture = await lease
    assert mixture.params == {"weight": "a"}
    mixer.cache.release(mixture)
    await settled()
    assert mixer.cache.num_bytes == 0


async def test_forget_of_what_is_not_there(mixer: Mixer) -> None:
    mixer.cache.forget("no such digest")
    assert mixer.cache.num_bytes == 0


async def test_a_caller_that_goes_does_not_stop_the_mix_of_others(mixer: Mixer) -> None:
    mixer.gate.clear()
    gone, stays = (asyncio.create_task(mixer.cache.lease(recipe("a"))) for _ in range(2))
    await settled()
    gone.cancel()
    mixer.gate.set()
    assert (await stays).num_users == 1


async def test_close_tells_who_waits(mixer: Mixer) -> None:
    mixer.gate.clear()
    lease = asyncio.create_task(mixer.cache.lease(recipe("a")))
    await settled()
    await mixer.cache.close()
    with pytest.raises(ModelNotReadyError, match="shutting down"):
        await lease
    with pytest.raises(ModelNotReadyError, match="shutting down"):
        await mixer.cache.lease(recipe("a"))


async def test_pinned_parameters_are_free_and_stay(mixer: Mixer) -> None:
    mixer.cache.pin(recipe("base").digest, {"weight": "base"})
    for name in ("a", "b", "c", "base"):
        mixer.cache.release(await mixer.cache.lease(recipe(name)))
    assert "base" not in mixer.mixed
    mixer.cache.forget(recipe("base").digest)
    assert mixer.cache.is_ready(recipe("base").digest)


@pytest.mark.parametrize("seed", range(5))
async def test_budget_holds_and_nobody_starves_under_random_load(mixer: Mixer, seed: int) -> None:
    rng = random.Random(seed)

    async def user() -> None:
        for _ in range(30):
            name = rng.choice("abcdef")
            mixture = await mixer.cache.lease(recipe(name))
            assert mixture.params == {"weight": name}
            for _ in range(rng.randint(0, 4)):
                await asyncio.sleep(0)
            assert mixture.params == {"weight": name}, "freed while in use"
            assert mixer.cache.num_bytes <= 2 * SIZE
            mixer.cache.release(mixture)

    async with asyncio.timeout(20):
        await asyncio.gather(*(user() for _ in range(8)))
