"""Batches of a loader: whole epochs, exact resume, front end, crops, unusable clips."""

import gc
import itertools
import logging
import pickle
import random
import signal

import numpy as np
import psutil
import pytest
import soundfile
import torch

from modeling_sslam import SSLAMFeatureExtractor
from training.data import stream
from training.data.config import DataConfig
from training.data.loader import make_loader
from training.data.sources import open_source

pytestmark = pytest.mark.slow


@pytest.fixture
def open_loader(tmp_path, write_parquet, make_folder, extractor):
    """Loaders over parquet shards or a folder of 23 clips."""
    sources = {}

    def open_loader(kind="parquet", sizes=(7, 3, 8, 5), batch_size=3, seed=0, rank=0, world_size=1, **kwargs):
        if (kind, sizes) not in sources:
            name = f"source{len(sources)}"
            if kind == "parquet":
                write_parquet(tmp_path / name, sizes)
            else:
                make_folder(sum(sizes), name)
            sources[kind, sizes] = str(tmp_path / name)
        loader_kwargs = {name: kwargs.pop(name) for name in ("repeat", "drop_last") if name in kwargs}
        config = DataConfig(sources[kind, sizes], **({"num_workers": 0, "shuffle_buffer": 4} | kwargs))
        return make_loader(
            open_source(config),
            extractor,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            **loader_kwargs,
        )

    return open_loader


def ids_of(batches):
    return [batch["ids"] for batch in batches]


def take(loader, count):
    return list(itertools.islice(loader, count))


def assert_same(batches, expected):
    assert ids_of(batches) == ids_of(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch["epochs"] == other["epochs"]
        assert torch.equal(batch["input_values"], other["input_values"])


# ----------------------------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize(
    ("world_size", "num_workers", "sizes"),
    [
        (1, 2, (7, 3, 8, 5)),
        (2, 0, (7, 3, 8, 5)),
        (3, 2, (7, 3, 8, 5)),  # uneven shares
        (5, 0, (7, 3)),  # fewer shards than ranks, but enough row groups
        (4, 2, (3,)),  # also fewer row groups than ranks
    ],
)
def test_every_clip_once_an_epoch(open_loader, kind, world_size, num_workers, sizes):
    ids = []
    for rank in range(world_size):
        loader = open_loader(kind, sizes, rank=rank, world_size=world_size, num_workers=num_workers, repeat=False)
        ids += itertools.chain(*ids_of(loader))
    assert len(ids) == sum(sizes)
    assert len(set(ids)) == sum(sizes)


def test_epochs_follow_one_another_and_no_clip_is_lost(open_loader):
    batches = take(open_loader(batch_size=5), 23)  # 5 epochs of 23 clips
    clips = [(epoch, id_) for batch in batches for epoch, id_ in zip(batch["epochs"], batch["ids"], strict=True)]
    assert [epoch for epoch, _ in clips] == [epoch for epoch in range(5) for _ in range(23)]
    orders = [[id_ for e, id_ in clips if e == epoch] for epoch in range(5)]
    assert all(set(order) == set(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 0), (2, 2)])
def test_each_rank_reads_its_own_files(open_loader, world_size, num_workers):
    """This holds even if the ranks do not divide the number of files evenly."""
    sizes = (7, 3, 8, 5, 2)
    file_of = np.repeat(range(5), sizes)
    readers = {file: set() for file in range(5)}
    for rank in range(world_size):
        loader = open_loader(sizes=sizes, rank=rank, world_size=world_size, num_workers=num_workers, repeat=False)
        for id_ in itertools.chain(*ids_of(loader)):
            readers[file_of[int(id_[4:])]].add(rank)
    assert [len(ranks) for ranks in readers.values()] == [1] * 5


def test_the_order_within_a_block_differs_from_epoch_to_epoch(open_loader):
    """The order of a single shard is that of its block, which holds all clips unless its random size is small."""
    loader = open_loader(sizes=(9,), batch_size=9, shuffle_buffer=1000, repeat=False)
    orders = []
    for epoch in range(8):
        loader.set_epoch(epoch)
        orders.append(tuple(itertools.chain(*ids_of(loader))))
    assert len(set(orders)) == 8
    assert {frozenset(order) for order in orders} == {frozenset(f"clip{i:03d}" for i in range(9))}


def test_the_order_depends_on_the_seed_alone(open_loader):
    """The loader does not use the global generators, so resuming it does not change them."""
    batches = take(open_loader("folder", num_workers=2), 6)
    before = torch.get_rng_state(), random.getstate()
    assert_same(take(open_loader("folder", num_workers=2), 6), batches)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.rand(1), random.random()
    assert_same(take(open_loader("folder", num_workers=2), 6), batches)
    assert ids_of(take(open_loader("folder", num_workers=2, seed=1), 6)) != ids_of(batches)


def test_without_shuffling_the_order_is_that_of_the_source(open_loader):
    loader = open_loader(shuffle_buffer=0, repeat=False)
    names = [f"clip{i:03d}" for i in range(23)]
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        assert list(itertools.chain(*ids_of(loader))) == names


@pytest.mark.parametrize("num_workers", [0, 2])
def test_set_epoch_and_one_pass(open_loader, num_workers):
    endless = take(open_loader(batch_size=1), 69)
    loader = open_loader(batch_size=1, repeat=False, num_workers=num_workers)
    for epoch in (0, 2, 1, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert {e for batch in batches for e in batch["epochs"]} == {epoch}
        if num_workers == 0:
            assert_same(batches, endless[23 * epoch : 23 * epoch + 23])


def test_the_last_batch(open_loader):
    sizes = [len(batch["ids"]) for batch in open_loader(batch_size=5, repeat=False)]
    assert sizes == [5, 5, 5, 5, 3]
    sizes = [len(batch["ids"]) for batch in open_loader(batch_size=5, repeat=False, drop_last=True)]
    assert sizes == [5, 5, 5, 5]


def test_a_rank_without_clips_is_an_error(open_loader):
    with pytest.raises(RuntimeError, match="no clip for rank 4 of 5"):
        take(open_loader(sizes=(3,), rank=4, world_size=5), 1)


def test_the_shuffle_buffer_mixes_beyond_its_shards(open_loader):
    orders = [list(itertools.chain(*ids_of(open_loader(seed=seed, repeat=False)))) for seed in range(20)]
    assert len({order[0] for order in orders}) > 5
    # Blocks of 4 clips are permuted, so neighbours in a shard rarely stay neighbours.
    neighbours = [sum(int(b[4:]) - int(a[4:]) == 1 for a, b in itertools.pairwise(order)) for order in orders]
    assert np.mean(neighbours) < 8


# ----------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("kind", ["parquet", "folder"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_exact_resume_after_any_batch(open_loader, kind, num_workers):
    """Resume is exact also beyond the first epoch, with pickled states, and from a state of a resumed loader."""
    total, seed = 18, 3
    loader = open_loader(kind, seed=seed, num_workers=num_workers)
    expected, states = [], [pickle.dumps(loader.state_dict())]
    for batch in itertools.islice(loader, total):
        expected.append(batch)
        states.append(pickle.dumps(loader.state_dict()))
    for start in range(total) if num_workers == 0 else (0, 1, 4, 7, 12):
        resumed = open_loader(kind, seed=seed, num_workers=num_workers)
        resumed.load_state_dict(pickle.loads(states[start]))
        assert_same(take(resumed, total - start), expected[start:])
        assert resumed.num_clips == 3 * total
        assert resumed.epoch == loader.epoch

    # A state saved by a resumed loader.
    resumed = open_loader(kind, seed=seed, num_workers=num_workers)
    resumed.load_state_dict(pickle.loads(states[4]))
    take(resumed, 5)
    again = open_loader(kind, seed=seed, num_workers=num_workers)
    again.load_state_dict(pickle.loads(pickle.dumps(resumed.state_dict())))
    assert_same(take(again, total - 9), expected[9:])


def test_resume_of_a_rank_in_a_pass_that_ends(open_loader):
    kwargs = {"rank": 1, "world_size": 2, "num_workers": 2, "repeat": False}
    loader = open_loader(**kwargs)
    iterator = iter(loader)
    take(iterator, 2)
    state = loader.state_dict()
    expected = list(iterator)
    resumed = open_loader(**kwargs)
    resumed.load_state_dict(state)
    assert_same(list(resumed), expected)


def test_resume_with_other_settings_is_refused(open_loader):
    loader = open_loader("folder", num_workers=2)
    take(loader, 2)
    with pytest.raises(ValueError, match="saved with num_workers=2, this run has num_workers=0"):
        open_loader("folder", num_workers=0).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="saved with seed=0, this run has seed=1"):
        open_loader("folder", num_workers=2, seed=1).load_state_dict(loader.state_dict())


def test_a_moved_folder_resumes(make_folder, extractor):
    folder = make_folder(9)

    def open_loader():
        source = open_source(DataConfig(str(folder), num_workers=0, shuffle_buffer=4))
        return make_loader(source, extractor, batch_size=2, seed=0)

    loader = open_loader()
    state, expected = None, []
    for i, batch in enumerate(take(loader, 6)):
        expected.append(batch)
        state = loader.state_dict() if i == 5 else state
    folder = folder.rename(folder.parent / "elsewhere")
    resumed = open_loader()
    resumed.load_state_dict(state)
    again = take(open_loader(), 6)
    assert_same(again, expected)
    assert take(resumed, 1)[0]["ids"] == take(open_loader(), 7)[6]["ids"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_survive_the_signal_that_ends_a_run(open_loader, number):
    """Ctrl-C and schedulers signal every process, while the main one still finishes its update."""
    loader = open_loader("folder", num_workers=2)
    batches = iter(loader)
    first = take(batches, 1)
    # A forked worker has the command line of its parent; helpers of multiprocessing, from other tests, do not.
    main = psutil.Process()
    alive = [child for child in main.children() if child.status() != psutil.STATUS_ZOMBIE]
    workers = [child for child in alive if child.cmdline() == main.cmdline()]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(number)
    assert_same(first + take(batches, 11), take(open_loader("folder", num_workers=2), 12))
    assert {process.pid for process in workers} <= {process.pid for process in psutil.Process().children()}
    del batches, loader
    gc.collect()
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_loaders_of_one_source_do_not_disturb_each_other(open_loader, extractor, kind):
    """A run can train on a source and validate on the clips that it holds out."""
    expected = take(open_loader(kind), 8)
    loader = open_loader(kind)
    other = make_loader(loader.stream.source, extractor, batch_size=2, seed=5, repeat=False)
    batches, states = [], []
    for batch in itertools.islice(loader, 8):
        batches.append(batch)
        states.append(loader.state_dict())
        assert len(list(other)) == 12
    assert_same(batches, expected)
    resumed = open_loader(kind)
    resumed.load_state_dict(states[3])
    assert_same(take(resumed, 4), expected[4:])


# -------------------------------------------------------------------------------------------------- front end, crops


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_front_end_gives_the_same_numbers_in_worker_and_on_device(open_loader, extractor, num_workers):
    in_worker = open_loader("folder", num_workers=num_workers)
    on_device = open_loader("folder", num_workers=num_workers, front_end="device")
    for batch, other in zip(take(in_worker, 4), take(on_device, 4), strict=True):
        assert batch["ids"] == other["ids"]
        assert "input_values" not in other
        assert other["waveforms"].shape == (3, 4800)
        values = on_device.input_values(other, "cpu")
        assert torch.equal(in_worker.input_values(batch, "cpu"), values)
        clips = [waveform.numpy() for waveform in other["waveforms"]]
        assert torch.equal(values, extractor(clips, sampling_rate=16_000, return_tensors="pt")["input_values"])


def test_clips_of_different_lengths(tmp_path, encode, extractor):
    for i, seconds in enumerate((0.2, 0.3, 5.0)):
        (tmp_path / f"{i}.flac").write_bytes(encode(i, seconds))
    values = {}
    for front_end in ("worker", "device"):
        config = DataConfig(str(tmp_path), num_workers=0, shuffle_buffer=0, crop="head", front_end=front_end)
        loader = make_loader(open_source(config), extractor, batch_size=3, seed=0)
        batch = next(iter(loader))
        values[front_end] = loader.input_values(batch, "cpu")
    assert batch["num_samples"].tolist() == [3200, 4800, 31 * 160 + 400]
    assert values["worker"].shape == (3, 32, 128)
    assert torch.equal(values["worker"], values["device"])


def crops(tmp_path, extractor, num_batches=12, **kwargs):
    config = DataConfig(str(tmp_path), **({"shuffle_buffer": 2, "front_end": "device"} | kwargs))
    loader = make_loader(open_source(config), extractor, batch_size=1, seed=0)
    return {
        (batch["epochs"][0], batch["ids"][0]): batch["waveforms"][0] for batch in itertools.islice(loader, num_batches)
    }


def test_random_crops_are_a_function_of_seed_epoch_and_clip(tmp_path, encode, extractor):
    for i in range(4):
        (tmp_path / f"{i}.flac").write_bytes(encode(i, 3.0))
    one, two = (crops(tmp_path, extractor, num_workers=n) for n in (0, 2))
    common = one.keys() & two.keys()
    assert len(common) >= 6
    assert all(torch.equal(one[key], two[key]) for key in common)
    assert not torch.equal(one[0, "0.flac"], one[1, "0.flac"])
    heads = crops(tmp_path, extractor, num_workers=0, crop="head")
    assert torch.equal(heads[0, "0.flac"], heads[1, "0.flac"])
    assert all(len(waveform) == 31 * 160 + 400 for waveform in [*one.values(), *heads.values()])


def test_crops_reach_every_part_of_a_long_file(tmp_path, extractor):
    ramp = np.linspace(-0.9, 0.9, 10 * 16_000)
    soundfile.write(tmp_path / "ramp.wav", ramp, 16_000, subtype="FLOAT")
    starts = [waveform[0].item() for waveform in crops(tmp_path, extractor, 60, num_workers=0).values()]
    assert min(starts) < -0.7
    assert max(starts) > 0.6
    assert abs(np.mean(starts)) < 0.25


# ---------------------------------------------------------------------------------------------------- unusable clips


@pytest.fixture
def damaged_folder(make_folder, encode):
    folder = make_folder(20)
    (folder / "empty.flac").write_bytes(b"")
    (folder / "garbage.mp3").write_bytes(bytes(2000))
    (folder / "short.wav").write_bytes(encode(seconds=0.1, file_format="WAV"))
    data = encode(seconds=1.0)
    (folder / "torn.flac").write_bytes(data[: len(data) // 2])
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unusable_clips_are_skipped_counted_and_named(damaged_folder, extractor, caplog, num_workers):
    config = DataConfig(str(damaged_folder), num_workers=num_workers, shuffle_buffer=4, max_skipped_fraction=0.5)
    loader = make_loader(open_source(config), extractor, batch_size=3, seed=0, repeat=False)
    with caplog.at_level(logging.WARNING):
        assert sum(len(batch["ids"]) for batch in loader) == 20
    assert loader.skipped == {"empty": 1, "undecodable": 2, "too_short": 1}
    for name in ("empty.flac", "garbage.mp3", "short.wav", "torn.flac"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_of_skipped_clips_survive_a_resume(damaged_folder, extractor, monkeypatch, num_workers):
    """The counts survive even if skipped clips are reported between two batches."""
    monkeypatch.setattr(stream, "MAX_UNREPORTED_SKIPS", 1)
    config = DataConfig(str(damaged_folder), num_workers=num_workers, shuffle_buffer=4, max_skipped_fraction=0.5)

    def open_loader():
        return make_loader(open_source(config), extractor, batch_size=3, seed=0)

    loader = open_loader()
    expected, states = [], []
    for batch in itertools.islice(loader, 16):
        expected.append(batch)
        states.append((loader.state_dict(), dict(loader.skipped)))
    assert loader.skipped.total() > 6
    for start in range(0, 16, 3):
        resumed = open_loader()
        resumed.load_state_dict(states[start][0])
        assert resumed.skipped == states[start][1]
        assert_same(take(resumed, 15 - start), expected[start + 1 :])
        assert resumed.skipped == loader.skipped


def test_too_many_unusable_clips_stop_the_run(damaged_folder, extractor):
    config = DataConfig(str(damaged_folder), num_workers=0, shuffle_buffer=4, max_skipped_fraction=0.1)
    loader = make_loader(open_source(config), extractor, batch_size=3, seed=0)
    with pytest.raises(
        RuntimeError, match=r"of 10\d clips of .* are unusable \(\d+ undecodable, .*max_skipped_fraction"
    ):
        take(loader, 100)
    assert loader.num_clips > 60


def test_a_source_of_nothing_but_unusable_clips_stops_the_run(tmp_path, extractor):
    for i in range(5):
        (tmp_path / f"{i}.wav").write_bytes(b"")
    source = open_source(DataConfig(str(tmp_path), num_workers=0, max_skipped_fraction=0.9))
    loader = make_loader(source, extractor, batch_size=2, seed=0)
    with pytest.raises(RuntimeError, match=r"\d+ of \d+ clips of .* are unusable \(\d+ empty\)"):
        take(loader, 1)


# ------------------------------------------------------------------------------------------------------------ memory


def test_memory_stays_flat_over_many_epochs(tmp_path, write_parquet):
    """Load 40 epochs of 24 MB of clips in this process. The shuffle buffer holds 3 MB."""
    write_parquet(tmp_path / "data", [20, 20, 20, 20], seconds=10.0)
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    config = DataConfig(str(tmp_path / "data"), num_workers=0, shuffle_buffer=8)
    loader = make_loader(open_source(config), SSLAMFeatureExtractor(max_length=32), batch_size=8, seed=0)
    process, peaks = psutil.Process(), []
    for i, _ in enumerate(itertools.islice(loader, 400)):
        if i % 100 == 0:
            peaks.append(0)
        peaks[-1] = max(peaks[-1], process.memory_info().rss)
    print(f"data {size / 2**20:.0f} MB, peak RSS in each 10 epochs {[round(peak / 2**20) for peak in peaks]} MB")
    assert peaks[-1] - peaks[0] < size / 2
