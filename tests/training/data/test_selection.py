import csv
from collections import Counter

import numpy as np
import pytest

from training.data.config import DataConfig
from training.data.loader import make_loader
from training.data.selection import WeightedDraw, selections_of
from training.data.sources import open_source


@pytest.fixture
def write_weights(tmp_path):
    def write_weights(weights: dict[str, float], name="weights.csv"):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([("id", "weight"), *weights.items()])
        return str(tmp_path / name)

    return write_weights


def test_a_single_draw_follows_the_weights(write_weights):
    weights = {"a": 1.0, "b": 2.0, "c": 5.0, "never": 0.0}
    draw = WeightedDraw(write_weights(weights), clips_per_epoch=1, seed=0)
    epochs = 3000
    counts = Counter(id_ for epoch in range(epochs) for id_ in weights if draw(id_, epoch))
    assert counts.total() == epochs
    for id_, weight in weights.items():
        share = weight / 8
        assert counts[id_] / epochs == pytest.approx(share, abs=4 * (share * (1 - share) / epochs) ** 0.5)


def test_a_second_draw_is_among_the_other_clips(write_weights):
    draw = WeightedDraw(write_weights({"a": 1.0, "b": 1.0, "c": 2.0}), clips_per_epoch=2, seed=1)
    epochs = 3000
    without_c = sum(not draw("c", epoch) for epoch in range(epochs))
    # Either a then b, or b then a, each with probability 1/4 * 1/3.
    assert without_c / epochs == pytest.approx(1 / 6, abs=0.03)


def test_the_draw_depends_on_seed_and_epoch_alone(write_weights):
    path = write_weights({f"clip{i}": 1.0 + i % 3 for i in range(200)})
    drawn = {seed: WeightedDraw(path, 50, seed).drawn(3) for seed in (0, 1)}
    assert (drawn[0] == WeightedDraw(path, 50, 0).drawn(3)).all()
    assert (drawn[0] != drawn[1]).any()
    assert (drawn[0] != WeightedDraw(path, 50, 0).drawn(4)).any()
    assert drawn[0].sum() == 50


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 2), (3, 0)])
def test_all_ranks_together_see_each_drawn_clip_once_an_epoch(
    make_folder, write_weights, extractor, world_size, num_workers
):
    folder = make_folder(24)
    ids = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.flac"))
    path = write_weights({id_: 1.0 + i for i, id_ in enumerate(ids)})
    draw = WeightedDraw(path, 10, seed=7)
    wanted = {(id_, epoch) for epoch in range(2) for id_ in ids if draw(id_, epoch)}
    assert len(wanted) == 20

    config = DataConfig(
        str(folder), sample_weights=path, clips_per_epoch=10, shuffle_buffer=4, num_workers=num_workers
    )
    seen = Counter()
    for rank in range(world_size):
        loader = make_loader(open_source(config), extractor, batch_size=1, seed=7, rank=rank, world_size=world_size)
        for batch in loader:
            seen.update(zip(batch["ids"], batch["epochs"], strict=True))
            if loader.epoch > 2 + num_workers:
                break
    early = {key: count for key, count in seen.items() if key[1] < 2}
    assert early.keys() == wanted
    assert set(early.values()) == {1}


def test_a_run_with_draws_resumes_exactly(make_folder, write_weights, extractor):
    folder = make_folder(20)
    path = write_weights({p.relative_to(folder).as_posix(): 1.0 for p in folder.rglob("*.flac")})
    config = DataConfig(str(folder), sample_weights=path, clips_per_epoch=7, shuffle_buffer=3, num_workers=0)

    def ids_of(loader, count):
        batches = iter(loader)
        return [next(batches)["ids"] for _ in range(count)]

    straight = ids_of(make_loader(open_source(config), extractor, batch_size=2, seed=0), 12)
    first = make_loader(open_source(config), extractor, batch_size=2, seed=0)
    assert ids_of(first, 5) == straight[:5]
    second = make_loader(open_source(config), extractor, batch_size=2, seed=0)
    second.load_state_dict(first.state_dict())
    assert ids_of(second, 7) == straight[5:]


def test_held_out_clips_and_the_others_together_are_the_source(make_folder, extractor):
    folder = make_folder(40)
    sides = []
    for held_out in (False, True):
        config = DataConfig(str(folder), hold_out=0.3, held_out=held_out, num_workers=0)
        loader = make_loader(open_source(config), extractor, batch_size=4, seed=int(held_out), repeat=False)
        sides.append([id_ for batch in loader for id_ in batch["ids"]])
    assert len(sides[0]) + len(sides[1]) == 40
    assert not set(sides[0]) & set(sides[1])
    assert 4 < len(sides[1]) < 20


def test_the_share_of_held_out_clips_is_about_the_fraction():
    (select,) = selections_of(DataConfig("x", hold_out=0.25, held_out=True), seed=0)
    share = np.mean([select(f"clip{i}", 0) for i in range(4000)])
    assert share == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("weights", "clips_per_epoch", "message"),
    [
        ({"a": 1.0, "b": 0.0}, 2, "has 1 clips of positive weight; 2 cannot be drawn"),
        ({"a": 1.0, "b": 2.0, "c": 0.0}, 2, "clips_per_epoch=2 draws all clips .* have no effect; draw fewer"),
        ({"a": -1.0}, 1, "negative or not finite"),
        ({"a": "nan"}, 1, "negative or not finite"),
    ],
)
def test_impossible_weights_are_refused(write_weights, weights, clips_per_epoch, message):
    with pytest.raises(ValueError, match=message):
        WeightedDraw(write_weights(weights), clips_per_epoch, 0)


def test_weights_of_another_source_are_refused(write_weights, tmp_path):
    with pytest.raises(ValueError, match="no weight for clip z"):
        WeightedDraw(write_weights({"a": 1.0}), 1, 0)("z", 0)
    (tmp_path / "twice.csv").write_text("id,weight\na,1\na,2\n")
    with pytest.raises(ValueError, match="names a clip twice"):
        WeightedDraw(tmp_path / "twice.csv", 1, 0)
    (tmp_path / "columns.csv").write_text("0.5\n0.25\n")
    with pytest.raises(ValueError, match="must have the columns id and weight"):
        WeightedDraw(tmp_path / "columns.csv", 1, 0)
    with pytest.raises(ValueError, match="go together"):
        DataConfig("x", clips_per_epoch=3)
