from itertools import chain, islice, zip_longest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archzoo.tasks.task import TensorSplit
from archzoo.training.data import BatchOrder, eval_batches, train_batches
from tests.training.support import Blobs

sizes = {"examples": st.integers(1, 50), "batch_size": st.integers(1, 20), "seed": st.integers(0, 2**40)}


@given(**sizes, start=st.integers(0, 40))
def test_the_order_can_be_entered_at_any_batch(examples, batch_size, seed, start):
    whole = list(islice(BatchOrder(examples, batch_size, seed=seed), start + 5))
    assert list(islice(BatchOrder(examples, batch_size, seed=seed, start=start), 5)) == whole[start:]


@given(**sizes)
def test_an_epoch_shows_no_example_twice_and_leaves_out_less_than_a_batch(examples, batch_size, seed):
    order = BatchOrder(examples, batch_size, seed=seed)
    seen = [i for batch in islice(order, order.batches_per_epoch) for i in batch]
    assert len(seen) == len(set(seen)) > examples - batch_size
    assert set(seen) <= set(range(examples))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = list(islice(BatchOrder(20, 19, seed=3), 2))
    other = next(iter(BatchOrder(20, 19, seed=4)))
    assert first != second != other != first


@pytest.mark.parametrize("batch_size", [20, 21, 10**9])
def test_a_batch_size_of_all_examples_or_more_gives_the_same_full_batch_at_every_step(batch_size):
    order = BatchOrder(20, batch_size, seed=3, start=5)
    assert list(islice(order, 3)) == [list(range(20))] * 3
    assert order.batches_per_epoch == 1


@given(
    world_sizes=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    starts=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    shuffle=st.booleans(),
    batches_per_epoch=st.none() | st.integers(1, 8),
    **sizes,
)
def test_ranks_share_the_very_batches_of_one_process_also_resumed_at_another_world_size(
    world_sizes, starts, shuffle, batches_per_epoch, examples, batch_size, seed
):
    def batches(start, count, rank=0, world_size=1):
        options = {"shuffle": shuffle, "batches_per_epoch": batches_per_epoch}
        order = BatchOrder(examples, batch_size, seed=seed, start=start, rank=rank, world_size=world_size, **options)
        return list(islice(order, count))

    whole = batches(0, sum(starts))
    shared = []
    for world_size, start, count in zip(world_sizes, (0, starts[0]), starts, strict=True):
        ranks = [batches(start, count, rank, world_size) for rank in range(world_size)]
        for parts in zip(*ranks, strict=True):
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            # Dealt back in turn: nothing is lost, nothing comes twice, and the order is the one of a single process.
            shared.append([i for turn in zip_longest(*parts) for i in turn if i is not None])
    assert shared == whole


@given(
    world_size=st.integers(1, 8),
    examples=st.integers(0, 50),
    batch_size=st.integers(1, 20),
    limit=st.none() | st.integers(1, 8),
    whole_batches=st.booleans(),
)
def test_evaluation_shows_every_example_to_one_rank(world_size, examples, batch_size, limit, whole_batches):
    numbers = torch.arange(examples)
    split = TensorSplit(numbers, numbers) if whole_batches else list(zip(numbers, numbers, strict=True))
    task = Blobs()

    def batches(**share):
        return [x.tolist() for x, _ in eval_batches(task, split, batch_size, limit, **share)]

    whole = batches()
    shown = min(examples, batch_size * limit) if limit else examples
    assert list(chain(*whole)) == list(range(shown))
    parts = [batches(rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(part) <= len(whole) and all(part) for part in parts)
    assert sorted(chain(*chain(*parts))) == list(range(shown))


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank, world_size):
    with pytest.raises(ValueError, match=f"rank={rank}: must be from 0 to world_size - 1, and world_size is"):
        BatchOrder(10, 5, seed=0, rank=rank, world_size=world_size)


def test_unshuffled_batches_come_in_order_and_stop_early_on_request():
    order = BatchOrder(10, 3, seed=0, shuffle=False, batches_per_epoch=2)
    assert list(islice(order, 4)) == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_processes_give_the_same_batches_and_leave_the_global_generator_alone(workers):
    task = Blobs()
    before = torch.get_rng_state()
    inline = islice(train_batches(task, task.train, BatchOrder(96, 10, seed=1), workers=0), 12)
    loaded = islice(train_batches(task, task.train, BatchOrder(96, 10, seed=1), workers=workers), 12)
    for (x, y), (loaded_x, loaded_y) in zip(inline, loaded, strict=True):
        assert torch.equal(x, loaded_x)
        assert torch.equal(y, loaded_y)
    assert torch.equal(before, torch.get_rng_state())


def test_a_split_without_batch_reading_is_collated():
    class OneByOne(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.tensor([float(index)]), index

    x, y = next(train_batches(Blobs(), OneByOne(), BatchOrder(5, 5, seed=0, shuffle=False), workers=0))
    assert x.tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert y.tolist() == [0, 1, 2, 3, 4]


def test_evaluation_sees_every_example_once():
    task = Blobs()
    seen = torch.cat([y for _, y in eval_batches(task, task.val, 7, None)])
    assert torch.equal(seen, task.val.targets)
    assert sum(len(y) for _, y in eval_batches(task, task.val, 7, 2)) == 14
