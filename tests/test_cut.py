"""The frozen-prefix cache: its entries are the prefix, wherever they lie and however they came."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jft.data.images import is_random, make_train_transform, make_view_transform
from jft.data.loader import make_train_loader
from jft.data.order import make_index_loader
from jft.data.sources import ArraySource, make_splits
from jft.errors import ConfigError, DataError
from jft.freeze import entry_store
from jft.freeze.cache_choice import CacheCosts, decide_cache, runs_in_parts
from jft.freeze.cut import cached_batch_shape, fill_cache, table_shape
from jft.freeze.entry_store import Room, entries_path, host_free_bytes, measure_room
from jft.freeze.prefix import Prefix, split_identity
from jft.losses import softmax
from jft.models.own import own_model
from jft.models.zoo import make_model
from jft.train.parallel import make_parallel
from jft.train.step import features
from jft.tree import flatten, merge, split

pytestmark = pytest.mark.usefixtures("quick")

VIEWS = 2
LABEL = jax.ShapeDtypeStruct((8,), np.int32)
MODELS = {"vit_tiny": 3, "efficientnet_lite_tiny": 3}  # with a cut in the middle
ARGS = {
    "vit_tiny": {"depth": 3},
    "efficientnet_lite_tiny": {
        "blocks": ((1, 3, 1, 1, 8), (1, 5, 2, 2, 8), (1, 3, 1, 2, 8)),
        "final_features": 16,
    },
}
TIERS = ("device", "host", "disk")


@functools.cache
def made(name):
    """(model, params, statistics): statistics that differ from their initial values."""
    model = make_model(name=name, args=ARGS[name], num_classes=5)
    size = model.preprocess.image_size
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, size, size, 3)))
    params, stats = flatten(variables["params"]), flatten(variables.get("batch_stats", {}))
    rng = np.random.default_rng(0)
    stats = {
        p: np.asarray(x + rng.uniform(0.1, 0.5, x.shape), np.float32) for p, x in stats.items()
    }
    return model, {p: np.asarray(x) for p, x in params.items()}, stats


def make_source(count=11, seed=0):
    rng = np.random.default_rng(seed)
    return ArraySource(rng.integers(0, 256, (count, 16, 16, 3), np.uint8), np.arange(count) % 5)


def make_prefix(name="vit_tiny", cuts=None, views=VIEWS, chunk=4, crop="none", **described):
    model = made(name)[0]
    return Prefix(
        apply=model.apply,
        transform=make_view_transform(model.preprocess, seed=3, crop=crop),
        stages=model.stages,
        cuts=cuts or (MODELS[name],),
        image_shape=(16, 16, 3),
        views=views,
        described=described,
        chunk=chunk,
    )


def fill(prefix, tmp_path, tier="host", name="vit_tiny", source=None, devices=1, **options):
    source = source or make_source()
    parallel = make_parallel(mode="auto", devices=devices)
    leaves = made(name)[1:]
    return fill_cache(
        prefix, *leaves, source, parallel=parallel, tier=tier, workdir=tmp_path, **options
    )


def directly(prefix, name, source, examples, view):
    """The prefix of these examples, as an uncached step runs it."""
    model, params, stats = made(name)
    variables = {"params": merge(params)} | ({"batch_stats": merge(stats)} if stats else {})
    examples = np.asarray(examples, np.int32)

    @jax.jit
    def run(images, examples, views):
        return model.apply(variables, prefix.transform(images, examples, views), stop=prefix.cut)

    return np.asarray(run(source.images[examples], examples, np.full_like(examples, view)))


def far(a, b):
    """Largest difference against the largest value."""
    assert a.shape == b.shape and a.dtype == b.dtype
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


# --- views and the order without images ---------------------------------------------------------


def test_views_differ_recur_and_do_not_depend_on_the_batch():
    transform = jax.jit(make_prefix(crop="random_resized").transform)
    images, examples = make_source().images[:6], np.arange(6, dtype=np.int32)
    views = [np.full(6, view, np.int32) for view in (0, 1)]
    first, second = (np.asarray(transform(images, examples, view)) for view in views)
    assert all(np.any(a != b) for a, b in zip(first, second, strict=True))
    order = np.array([4, 1, 5, 0], np.int32)
    again = np.asarray(transform(images[order], order, np.array([0, 1, 0, 1], np.int32)))
    expected = np.stack([first[4], second[1], first[5], second[0]])
    np.testing.assert_array_equal(again, expected)


def test_without_random_augmentation_the_view_is_the_training_input():
    preprocess = made("vit_tiny")[0].preprocess
    plain = make_train_transform(preprocess, flip=False)
    viewed = make_view_transform(preprocess, seed=3, flip=False)
    images, rows = make_source().images[:4], np.arange(4, dtype=np.int32)
    np.testing.assert_array_equal(
        plain(images, jax.random.key(0), rows), viewed(images, rows, rows)
    )
    assert not is_random(flip=False, crop="none")
    assert is_random(flip=True, crop="none") and is_random(flip=False, crop="random_resized")


def load(source, count, **options):
    loader = make_train_loader(source, image_shape=(16, 16, 3), **options)
    found = list(itertools.islice(loader, count))
    loader.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_order_without_images_is_the_training_order(ranks):
    source = make_source()
    for rank in range(ranks):
        options = dict(batch_size=4, seed=5, views=3, rank=rank, ranks=ranks)
        whole = load(source, 12, **options)  # four epochs of 11, edges inside batches
        for start in (0, 2, 7):
            indexed = make_index_loader(source, start_batch=start, **options)
            for batch, bare in zip(whole[start:], indexed, strict=False):
                assert bare.keys() == {"example", "view", "label", "mask"}
                for name, leaf in bare.items():
                    assert leaf.dtype == batch[name].dtype
                    np.testing.assert_array_equal(leaf, batch[name])
            assert indexed.position == 12
            np.testing.assert_array_equal(indexed[3]["example"], whole[3]["example"])


def test_the_view_is_the_visit_modulo_k():
    seen: dict[int, list[int]] = {}
    for batch in itertools.islice(
        make_index_loader(make_source(), batch_size=4, seed=0, views=2), 11
    ):
        for example, view in zip(batch["example"].tolist(), batch["view"].tolist(), strict=True):
            seen.setdefault(example, []).append(view)
    assert seen == {example: [0, 1, 0, 1] for example in range(11)}


# --- entries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_entries_are_the_prefix_and_the_same_on_every_tier(name, tmp_path):
    prefix, source = make_prefix(name, crop="random_resized"), make_source()
    caches = {tier: fill(prefix, tmp_path, tier, name, source) for tier in TIERS}
    entries = {tier: cache.entries() for tier, cache in caches.items()}
    for tier in TIERS:
        assert entries[tier].tobytes() == entries["host"].tobytes()
        assert len(entries[tier]) == 11 * VIEWS and caches[tier].tier == tier
    for view in range(VIEWS):
        wanted = directly(prefix, name, source, range(11), view)
        assert far(entries["host"][view::VIEWS], wanted) < 1e-5
    again = fill(prefix, tmp_path / "other", "host", name, source)
    assert again.entries().tobytes() == entries["host"].tobytes()
    assert again.key == caches["disk"].key


def test_a_single_view_and_bfloat16_entries_on_every_tier(tmp_path):
    model = make_model(name="vit_tiny", num_classes=5, args={"dtype": "bfloat16"})
    prefix = dataclasses.replace(make_prefix(views=1), apply=model.apply)
    found = [fill(prefix, tmp_path, tier) for tier in TIERS]
    found += [fill(prefix, tmp_path, "disk")]
    assert {cache.entries().dtype.name for cache in found} == {"bfloat16"}
    assert len({cache.entries().tobytes() for cache in found}) == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_suffix_gives_logits_and_gradients_of_the_whole_model(name, tmp_path):
    model, params, stats = made(name)
    prefix, source, loss = make_prefix(name), make_source(), softmax()
    mask = {p: model.stages.index(p.split("/")[0]) >= prefix.cut for p in params}
    trainable, frozen = split(params, mask)
    indexed = make_index_loader(source, batch_size=8, seed=0, views=VIEWS)[2]

    def losses(trainable, x, start):
        variables = {"params": merge(trainable, frozen)}
        variables |= {"batch_stats": merge(stats)} if stats else {}
        logits = model.apply(variables, x, start=start)
        return jnp.sum(loss(logits, indexed["label"])), logits

    grad = jax.jit(jax.grad(losses, has_aux=True), static_argnums=2)
    images = prefix.transform(
        source.images[indexed["example"]], indexed["example"], indexed["view"]
    )
    whole, logits = grad(trainable, images, 0)
    for tier in TIERS:
        cache = fill(prefix, tmp_path, tier, name, source)
        batch = cache.batch(indexed)
        shapes = {n: (x.shape, x.dtype) for n, x in batch.items()}
        assert shapes == {n: (x.shape, x.dtype) for n, x in cache.batch_shape(LABEL).items()}
        entry = prefix.entry(params, stats)
        assert cached_batch_shape(tier, LABEL, entry.shape, entry.dtype) == cache.batch_shape(LABEL)
        part, cached = grad(trainable, features(cache.table, batch), prefix.cut)
        assert far(np.asarray(cached), np.asarray(logits)) < 1e-5
        assert part.keys() == trainable.keys()
        for path in part:
            scale = max(float(jnp.max(jnp.abs(whole[path]))), 1e-3)
            assert float(jnp.max(jnp.abs(part[path] - whole[path]))) / scale < 1e-5, path


@pytest.mark.parametrize("tier", TIERS)
def test_batches_read_ahead_are_the_batches_in_order(tier, tmp_path):
    cache = fill(make_prefix(), tmp_path, tier)
    stream = [
        make_index_loader(make_source(), batch_size=4, seed=0, views=VIEWS)[i] for i in range(5)
    ]
    found = list(cache.batches(stream))
    assert len(found) == 5
    for indexed, batch in zip(stream, found, strict=True):
        rows = cache.entries()[indexed["example"] * VIEWS + indexed["view"]]
        np.testing.assert_array_equal(features(cache.table, batch), rows)
        np.testing.assert_array_equal(batch["label"], indexed["label"])


@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_fill_their_shares(name, tmp_path):
    prefix = make_prefix(name)
    one = fill(prefix, tmp_path, "host", name).entries()
    for tier in ("device", "host"):
        many = fill(prefix, tmp_path, tier, name, devices=8)
        assert far(many.entries(), one) < 1e-5
        if tier == "device":
            assert len(many.table.sharding.device_set) == 8
            entry = prefix.entry(*made(name)[1:])
            shape = table_shape(prefix, entry, 11, make_parallel(mode="auto", devices=8))
            assert (shape.shape, shape.dtype) == (many.table.shape, many.table.dtype)


def test_a_table_on_eight_devices_is_gathered_inside_a_sharded_step(tmp_path):
    parallel = make_parallel(mode="auto", devices=8)
    cache = fill(make_prefix(), tmp_path, "device", devices=8)
    batch = cache.batch(make_index_loader(make_source(), batch_size=8, seed=0, views=VIEWS)[1])
    step = jax.jit(lambda table, batch: features(table, batch), out_shardings=parallel.batched)
    found = step(cache.table, parallel.place_batch(batch))
    np.testing.assert_array_equal(found, cache.entries()[batch["entry"]])


# --- deeper cuts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cuts"), [("vit_tiny", (2, 4)), ("efficientnet_lite_tiny", (2, 5))]
)
@pytest.mark.parametrize("tier", TIERS)
def test_a_deeper_cut_starts_from_the_shallower_entries(name, cuts, tier, tmp_path, monkeypatch):
    source = make_source()
    shallow = fill(make_prefix(name, cuts[:1]), tmp_path, tier, name, source)
    alone = fill(make_prefix(name, cuts), tmp_path / "alone", "host", name, source)
    direct = fill(make_prefix(name, cuts[1:]), tmp_path / "direct", "host", name, source)
    # No image is read: the shallower entries are all that there is.
    monkeypatch.setattr(ArraySource, "gather", None)
    deep = fill(make_prefix(name, cuts), tmp_path, tier, name, source, shallower=[shallow])
    assert far(deep.entries(), direct.entries()) < 1e-6
    # A resumed run may have lost the shallower cache: it computes the same bits.
    assert deep.entries().tobytes() == alone.entries().tobytes()
    assert deep.key == alone.key != direct.key


def test_a_shallower_cache_of_other_weights_is_not_used(tmp_path):
    name, (_, params, stats) = "vit_tiny", made("vit_tiny")
    parallel = make_parallel(mode="auto", devices=1)
    changed = {**params, "blocks_0/mlp/fc1/bias": params["blocks_0/mlp/fc1/bias"] + 1}
    other = fill_cache(
        make_prefix(name, (2,)),
        changed,
        stats,
        make_source(),
        parallel=parallel,
        tier="host",
        workdir=tmp_path,
    )
    deep = fill(make_prefix(name, (2, 4)), tmp_path, shallower=[other])
    assert deep.entries().tobytes() == fill(make_prefix(name, (2, 4)), tmp_path).entries().tobytes()


# --- keys and files -----------------------------------------------------------------------------


def test_the_key_changes_with_all_that_decides_the_entries():
    _, params, stats = made("vit_tiny")
    parallel = make_parallel(mode="auto", devices=1)
    key = make_prefix().key(params, stats, parallel)
    below = {**params, "embed/patch/bias": params["embed/patch/bias"] + 1}
    above = {**params, "head/bias": params["head/bias"] + 1}
    assert make_prefix().key(above, stats, parallel) == key
    others = [
        make_prefix().key(below, stats, parallel),
        make_prefix(views=3).key(params, stats, parallel),
        make_prefix(cuts=(2,)).key(params, stats, parallel),
        make_prefix(cuts=(2, 3)).key(params, stats, parallel),
        make_prefix(chunk=8).key(params, stats, parallel),
        make_prefix(flip=False).key(params, stats, parallel),
        make_prefix().key(params, stats, make_parallel(mode="auto", devices=2)),
    ]
    assert len({key, *others}) == 8


def test_a_split_is_known_by_labels_names_and_pixels(tmp_path):
    source = make_source()
    assert split_identity(source) == split_identity(make_source())
    images, labels = source.images.copy(), source.labels.copy()
    images[7, 3, 2, 1] ^= 1
    assert split_identity(ArraySource(images, labels)) != split_identity(source)
    labels[3] = 4
    assert split_identity(ArraySource(source.images, labels)) != split_identity(source)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((6, 8), 10, np.uint8)).save(tmp_path / name / "0.png")
    load = functools.partial(make_splits, name="folder", path=str(tmp_path), val_fraction=0.0)
    first = split_identity(load().train)
    assert first == split_identity(load().train)
    Image.fromarray(np.full((6, 8), 11, np.uint8)).save(tmp_path / "b" / "0.png")
    assert split_identity(load().train) != first


class Calls:
    """Counts how often images are gathered."""

    def __init__(self, monkeypatch):
        self.count, plain = 0, ArraySource.gather

        def gather(source, indices):
            self.count += 1
            return plain(source, indices)

        monkeypatch.setattr(ArraySource, "gather", gather)

    def since(self):
        count, self.count = self.count, 0
        return count


def test_a_file_is_found_again_without_reading_an_image(tmp_path, monkeypatch):
    calls = Calls(monkeypatch)
    first = fill(make_prefix(), tmp_path, "disk")
    assert calls.since() > 0
    second = fill(make_prefix(), tmp_path, "disk")
    assert calls.since() == 0
    assert second.entries().tobytes() == first.entries().tobytes()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"{first.key}.entries"]


@pytest.mark.parametrize("at", [0, 1000, -60, -45, -12, -1])
def test_a_flipped_bit_anywhere_refills_the_file(at, tmp_path, monkeypatch, caplog):
    cache = fill(make_prefix(), tmp_path, "disk")
    good, path = cache.entries().tobytes(), entries_path(tmp_path, cache.key)
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.unlink()
    path.write_bytes(content)
    calls = Calls(monkeypatch)
    assert fill(make_prefix(), tmp_path, "disk").entries().tobytes() == good
    assert calls.since() > 0 and "filled anew" in caplog.text


@pytest.mark.parametrize("size", [0, 10, 5000, -1])
def test_a_truncated_file_is_refilled(size, tmp_path, monkeypatch):
    cache = fill(make_prefix(), tmp_path, "disk")
    good, path = cache.entries().tobytes(), entries_path(tmp_path, cache.key)
    content = path.read_bytes()[:size]
    path.unlink()
    path.write_bytes(content)
    calls = Calls(monkeypatch)
    assert fill(make_prefix(), tmp_path, "disk").entries().tobytes() == good
    assert calls.since() > 0


def test_a_whole_file_of_another_key_is_refilled(tmp_path, monkeypatch):
    """Such as one renamed by hand: it is intact, but of other weights."""
    old = fill(make_prefix(), tmp_path, "disk")
    new = fill(make_prefix(flip=False), tmp_path / "new", "disk")
    target = entries_path(tmp_path, new.key)
    entries_path(tmp_path, old.key).rename(target)
    calls = Calls(monkeypatch)
    fill(make_prefix(flip=False), tmp_path, "disk")
    assert calls.since() > 0
    assert target.read_bytes() == entries_path(tmp_path / "new", new.key).read_bytes()


def test_an_interrupted_fill_leaves_no_file(tmp_path, monkeypatch):
    plain, seen = entry_store.FileWriter.put, []

    def put(writer, start, values):
        seen.append(start)
        if len(seen) == 3:
            raise KeyboardInterrupt
        plain(writer, start, values)

    with monkeypatch.context() as patch:
        patch.setattr(entry_store.FileWriter, "put", put)
        with pytest.raises(KeyboardInterrupt):
            fill(make_prefix(), tmp_path, "disk")
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "cache" / "x.entries.tmp").write_bytes(b"of a killed run")
    cache = fill(make_prefix(), tmp_path, "disk")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"{cache.key}.entries"]


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match="freeze.cache=off"):
        fill(make_prefix(), tmp_path, "disk")


# --- bad images ---------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Twelve files, 3 and 4 unreadable."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "data" / ("a" if i < 4 else "b") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
        if i in (3, 4):
            path.write_bytes(b"not an image")
    return make_splits(name="folder", path=str(tmp_path / "data"), val_fraction=0.0).train


@pytest.mark.parametrize("tier", TIERS)
def test_a_bad_image_is_replaced_as_in_training(damaged, tier, tmp_path):
    for _ in range(2):  # filled, and on disk found again
        cache = fill(make_prefix(), tmp_path, tier, source=damaged, bad_image_quota=0.2)
        assert cache.replaced.tolist() == [0, 1, 2, 5, 5, *range(5, 12)]
        options = dict(batch_size=4, seed=0, views=VIEWS)
        whole = load(damaged, 6, bad_image_quota=0.2, **options)
        indexed = make_index_loader(damaged, replaced=cache.replaced, **options)
        for batch, bare in zip(whole, indexed, strict=False):
            for name in ("example", "view", "label", "mask"):
                np.testing.assert_array_equal(batch[name], bare[name])


def test_bad_images_beyond_the_quota_stop_the_fill(damaged, tmp_path):
    with pytest.raises(DataError, match="0[34].png"):
        fill(make_prefix(), tmp_path, "disk", source=damaged)
    assert not list((tmp_path / "cache").iterdir())


# --- decisions ----------------------------------------------------------------------------------

ROOM = Room(device=1 << 20, host=1 << 24, disk=1 << 30)
# 100 examples, visited 10 times: filling costs a tenth of what the prefix costs without a cache.
COSTS = CacheCosts(
    steps=100,
    batch_size=10,
    examples=100,
    views=1,
    prefix_flops=6e9,
    step_flops=12e9,
    entry_bytes=1 << 10,
    room=ROOM,
)


def decide(mode="auto", **changes):
    return decide_cache(mode, dataclasses.replace(COSTS, **changes))


def test_auto_caches_where_the_net_saving_is_worth_it_and_says_why():
    use, text = decide()
    assert use and "+45%" in text and "600 GFLOP" in text and "6 TFLOP of 12 TFLOP" in text
    assert "100 KiB in device memory" in text and "\n" not in text
    # Saved 0.5 of the phase; filling K views costs K / 20 of it: 7 views save 15 %, 8 save 10 %.
    assert decide(views=7)[0]
    assert not decide(views=8)[0] and "10% is the least" in decide(views=8)[1]
    assert not decide(steps=10)[0]  # one visit each: nothing is gained
    assert decide(steps=10, fill_flops=1e9)[0]  # unless a shallower cache is there
    assert not decide(prefix_flops=0)[0]
    assert not decide(prefix_flops=1e9, step_flops=20e9)[0]
    assert decide("on", views=8)[0] and not decide("off")[0]


def test_the_fastest_memory_that_holds_the_entries_is_chosen():
    for size, words in (
        (1 << 10, "device memory"),
        (1 << 16, "host memory"),
        (1 << 20, "in a file"),
    ):
        use, text = decide(entry_bytes=size)
        assert use and words in text
    use, text = decide(entry_bytes=1 << 24)
    assert not use and "1.56 GiB of entries fit neither device, host nor disk" in text
    with pytest.raises(ConfigError, match="fit neither"):
        decide("on", entry_bytes=1 << 24)
    assert [ROOM.tier(n) for n in (1 << 20, (1 << 20) + 1, 1 << 30, (1 << 30) + 1)] == [
        "device",
        "host",
        "disk",
        None,
    ]


def test_fresh_random_augmentation_cannot_be_cached():
    use, text = decide(views=None)
    assert not use and "freeze.views=K" in text
    with pytest.raises(ConfigError, match="freeze.views=K or switch augmentation off"):
        decide("on", views=None)
    with pytest.raises(ConfigError, match="did you mean 'auto'"):
        decide("autt")


def test_room_is_measured_and_shared_by_the_devices_of_a_cpu(tmp_path):
    assert host_free_bytes() > 1 << 20
    one, eight = (
        measure_room(make_parallel(mode="auto", devices=n), tmp_path / "not" / "yet")
        for n in (1, 8)
    )
    assert min(dataclasses.astuple(one)) > 0
    assert eight.device < 0.5 * one.device and one.device < one.host


def test_a_module_without_start_and_stop_is_known():
    from test_own_model import Plain  # a user's module that runs whole

    model = made("vit_tiny")[0]
    assert runs_in_parts(model.apply)
    assert not runs_in_parts(own_model(Plain(), 3).apply)
