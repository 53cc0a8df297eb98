"""Probes: signals equal direct computation, whatever the devices and the padding; nothing moves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_net import TinyNet, make_batch, make_parts

from jft.errors import ConfigError, DivergedError
from jft.losses import softmax
from jft.models.layers import Training
from jft.train.parallel import make_parallel
from jft.train.plasticity import make_plasticity, make_reference
from jft.train.probe import ELEMENT_SIGNALS, LEAF_SIGNALS, make_probe
from jft.train.step import StepParts

pytestmark = pytest.mark.usefixtures("quick")

ALL = (*LEAF_SIGNALS, *ELEMENT_SIGNALS)
CLASSES, WIDTH = 4, 6


def linear(**kw):
    """A softmax regression, its params and three ragged batches; gradients by hand below."""

    def apply(variables, x, training=None, rngs=None, mutable=False):
        del training, rngs
        dense = variables["params"]["dense"]
        logits = x @ dense["kernel"] + dense["bias"][None]
        return (logits, {}) if mutable else logits

    parts = StepParts(
        apply=apply,
        loss=softmax(),
        transform=lambda images, key, row: images,
        eval_transform=lambda images: images,
        **kw,
    )
    rng = np.random.default_rng(0)
    params = {
        "dense/bias": rng.normal(size=CLASSES).astype(np.float32),
        "dense/kernel": rng.normal(size=(WIDTH, CLASSES)).astype(np.float32),
    }
    batches = []
    for padding in (0, 3, 5):
        mask = np.ones(8, np.float32)
        mask[8 - padding :] = 0
        image = rng.normal(size=(8, WIDTH)).astype(np.float32)
        label = rng.integers(0, CLASSES, 8).astype(np.int32)
        batches.append({"image": image, "label": label, "mask": mask})
    return parts, params, batches


def by_hand(params, batch):
    """{path: [examples that count, ...]} gradients of each example's loss, float64."""
    rows = batch["mask"] > 0
    x, y = batch["image"][rows].astype(np.float64), batch["label"][rows]
    logits = x @ params["dense/kernel"] + params["dense/bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    off = p / p.sum(1, keepdims=True) - np.eye(CLASSES)[y]
    return {"dense/bias": off, "dense/kernel": x[:, :, None] * off[:, None, :]}


def measure(parts, params, stats, batches, devices=1, paths=None, signals=ALL, step=7):
    probe = make_probe(parts, make_parallel(devices=devices), paths or params, signals)
    return probe.measure(params, stats, step, batches)


def worst(a, b):
    """Largest relative difference of two measurements, against each leaf's largest entry."""
    gaps = []
    for one, two in ((a.values, b.values), (a.elements, b.elements)):
        assert one.keys() == two.keys()
        for signal in one:
            assert one[signal].keys() == two[signal].keys()
            for path, value in one[signal].items():
                other = two[signal][path]
                size = np.max(np.abs(other))
                gaps.append(np.max(np.abs(value - other)) / size if size else np.max(np.abs(value)))
    return max(gaps)


def same_bits(a, b):
    assert a.values == b.values and a.examples == b.examples
    return all(
        a.elements[s][p].tobytes() == b.elements[s][p].tobytes()
        for s in a.elements
        for p in a.elements[s]
    )


def test_every_signal_equals_its_formula_on_ragged_batches():
    parts, params, batches = linear()
    found = measure(parts, params, {}, batches)
    assert found.examples == 16
    assert set(found.values) == set(LEAF_SIGNALS) and set(found.elements) == set(ELEMENT_SIGNALS)
    each = [by_hand(params, batch) for batch in batches]
    for path, weight in params.items():
        examples = np.concatenate([grads[path] for grads in each])
        means = np.stack([grads[path].mean(0) for grads in each])
        mean = examples.mean(0)
        spread = means.var(-1, ddof=1, keepdims=True) + 1e-8
        norms = [np.linalg.norm(m) / np.linalg.norm(weight) for m in means]
        wanted = {
            "grad_norm": np.linalg.norm(mean),
            "grad_change": 3 * np.abs(mean).sum(),
            "rel_grad": np.mean(norms),
            "grad_snr": np.mean(means**2 / spread),
            "batch_snr": np.mean(means.mean(0) ** 2 / means.var(0, ddof=1)),
        }
        for signal, value in wanted.items():
            assert found.values[signal][path] == pytest.approx(value, rel=1e-4), signal
        assert found.elements["grad_abs"][path] == pytest.approx(np.abs(mean), rel=1e-4, abs=1e-7)
        fisher = np.mean(examples**2, axis=0)
        assert found.elements["fisher"][path] == pytest.approx(fisher, rel=1e-4)


def test_grad_change_is_the_norm_of_the_signed_sum_of_equally_full_batches():
    parts, params, batches = linear()
    batches = [dict(batch, mask=np.ones(8, np.float32)) for batch in batches]
    found = measure(parts, params, {}, batches, signals=["grad_change"])
    for path in params:
        summed = sum(by_hand(params, batch)[path].mean(0) for batch in batches)
        assert found.values["grad_change"][path] == pytest.approx(np.abs(summed).sum(), rel=1e-5)


def test_an_empty_batch_changes_nothing():
    parts, params, batches = linear()
    empty = dict(batches[0], mask=np.zeros(8, np.float32))
    with_it = measure(parts, params, {}, [*batches, empty])
    assert worst(with_it, measure(parts, params, {}, batches)) < 1e-6


BATCHES = [make_batch(seed=i, padding=3 if i % 2 else 0) for i in range(3)]


def test_device_counts_agree_with_dropout_augmentation_and_batchnorm():
    parts, params, stats = make_parts(dropout=0.3, augment=True)
    one, two, eight = (measure(parts, params, stats, BATCHES, devices=n) for n in (1, 2, 8))
    assert worst(two, one) < 1e-5 and worst(eight, one) < 1e-5


def test_micro_batches_agree_with_whole_ones_without_batchnorm():
    whole = make_parts(norm=False, dropout=0.3, augment=True)
    micro = make_parts(norm=False, dropout=0.3, augment=True, accum_steps=4)
    first, second = (measure(*made, BATCHES) for made in (whole, micro))
    assert worst(second, first) < 1e-5


@pytest.mark.parametrize("devices", [1, 8])
def test_what_padded_rows_hold_does_not_matter(devices):
    parts, params, stats = make_parts(dropout=0.3, augment=True)
    other = []
    for batch in BATCHES:
        gone = batch["mask"] == 0
        image, label = batch["image"].copy(), batch["label"].copy()
        image[gone], label[gone] = 255 - image[gone], (label[gone] + 1) % 5
        other.append(dict(batch, image=image, label=label))
    assert any(np.any(a["image"] != b["image"]) for a, b in zip(BATCHES, other, strict=True))
    probe = make_probe(parts, make_parallel(devices=devices), params, ALL)
    first = probe.measure(params, stats, 7, BATCHES)
    assert same_bits(probe.measure(params, stats, 7, other), first)


def test_equal_arguments_give_equal_bits_and_the_step_counts():
    parts, params, stats = make_parts(dropout=0.3, augment=True)
    probe = make_probe(parts, make_parallel(devices=2), params, ALL)
    first = probe.measure(params, stats, 7, BATCHES)
    assert same_bits(probe.measure(params, stats, 7, BATCHES), first)
    assert same_bits(measure(parts, params, stats, BATCHES, devices=2), first)
    assert json.loads(json.dumps(first.values)) == first.values
    later = probe.measure(params, stats, 8, BATCHES)
    assert later.values["grad_norm"] != first.values["grad_norm"]


def test_the_same_batch_twice_is_drawn_anew():
    parts, params, stats = make_parts(dropout=0.3)
    found = measure(parts, params, stats, [BATCHES[0]] * 2, signals=["batch_snr"])
    # Without fresh draws no gradient would vary, and the ratio would be 0.
    assert all(value > 0 for value in found.values["batch_snr"].values())


def test_a_probe_changes_and_consumes_nothing():
    parts, params, stats = make_parts(dropout=0.3, augment=True)
    parallel = make_parallel(devices=2)
    placed = parallel.place((params, stats))
    make_probe(parts, parallel, params, ALL).measure(*placed, 0, BATCHES)
    for leaves, old in zip(placed, (params, stats), strict=True):
        for path, leaf in leaves.items():
            assert np.asarray(leaf).tobytes() == np.asarray(old[path]).tobytes()


def test_some_leaves_have_the_same_signals_as_among_all_without_batchnorm():
    parts, params, stats = make_parts(norm=False, dropout=0.3, augment=True)
    full = measure(parts, params, stats, BATCHES)
    paths = ["blocks_0/conv/kernel", "head/bias"]
    part = measure(parts, params, stats, BATCHES, paths=paths)
    assert all(sorted(leaves) == paths for leaves in part.values.values())
    for signal in full.values:
        full.values[signal] = {p: full.values[signal][p] for p in paths}
    for signal in full.elements:
        full.elements[signal] = {p: full.elements[signal][p] for p in paths}
    assert worst(part, full) < 1e-5


@pytest.mark.parametrize("paths", ["all", "head"])
def test_batchnorm_uses_batch_moments_only_where_its_parameters_are_asked_for(paths):
    parts, params, stats = make_parts()
    stats = {path: leaf + 0.5 for path, leaf in stats.items()}
    live = [path for path in params if paths == "all" or path.startswith("head")]
    batch = BATCHES[1]
    found = measure(parts, params, stats, [batch], paths=live, signals=["grad_abs"])
    net = TinyNet()
    fixed = frozenset() if paths == "all" else frozenset({"stem/bn", "blocks_0/bn"})

    def loss(leaves):
        tree = {"params": {}, "batch_stats": {}}
        for kind, flat in (("params", {**params, **leaves}), ("batch_stats", stats)):
            for path, leaf in flat.items():
                *parents, name = path.split("/")
                node = tree[kind]
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[name] = leaf
        training = Training(batch["mask"], jnp.arange(16), None, 0, fixed)
        images = batch["image"].astype(jnp.float32) / 255 - 0.5
        logits, _ = net.apply(tree, images, training=training, mutable=["batch_stats"])
        return jnp.sum(parts.loss(logits, batch["label"]) * batch["mask"]) / 13

    wanted = jax.jit(jax.grad(loss))({path: params[path] for path in live})
    for path in live:
        assert found.elements["grad_abs"][path] == pytest.approx(
            np.abs(wanted[path]), rel=1e-4, abs=1e-6
        )


@pytest.mark.parametrize("norm", [False, True])
def test_fisher_is_the_mean_square_of_single_gradients_on_running_statistics(norm):
    parts, params, stats = make_parts(norm=norm)
    stats = {path: leaf + 0.5 for path, leaf in stats.items()}
    batch = BATCHES[1]
    found = measure(parts, params, stats, [batch], devices=8, signals=["fisher"])
    # With the head alone, BatchNorm keeps its statistics, so a batch of one is well defined.
    paths = [path for path in params if not norm or path.startswith("head")]
    single = make_probe(parts, make_parallel(devices=1), paths, ["grad_abs"])
    squares = dict.fromkeys(paths, 0.0)
    for row in range(13):
        one = {name: leaf[row : row + 1] for name, leaf in batch.items()}
        grads = single.measure(params, stats, 0, [one]).elements["grad_abs"]
        squares = {path: squares[path] + grads[path].astype(np.float64) ** 2 for path in paths}
    for path in paths:
        mean = squares[path] / 13
        assert found.elements["fisher"][path] == pytest.approx(mean, rel=1e-4, abs=1e-9)


def test_a_probe_compiled_ahead_measures_the_same():
    parts, params, stats = make_parts()
    parallel = make_parallel(devices=2)
    probe = make_probe(parts, parallel, params, ["grad_norm"])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, stats))
    probe.compile(*shapes, BATCHES[0])
    ahead = probe.measure(params, stats, 0, BATCHES)
    assert same_bits(
        measure(parts, params, stats, BATCHES, devices=2, signals=["grad_norm"], step=0), ahead
    )


def test_a_leaf_of_zeros_has_no_relative_gradient():
    parts, params, batches = linear()
    params["dense/bias"] = np.zeros_like(params["dense/bias"])
    found = measure(parts, params, {}, batches, signals=["rel_grad"]).values["rel_grad"]
    assert found["dense/bias"] == 0.0 and found["dense/kernel"] > 0


def test_mistakes_are_named():
    parts, params, batches = linear()
    parallel = make_parallel(devices=1)
    with pytest.raises(ConfigError, match="did you mean 'grad_norm'"):
        make_probe(parts, parallel, params, ["grad_nrm"])
    with pytest.raises(ConfigError, match="0 signals"):
        make_probe(parts, parallel, params, [])
    empty = dict(batches[0], mask=np.zeros(8, np.float32))
    with pytest.raises(ConfigError, match="needs one"):
        measure(parts, params, {}, [empty])
    with pytest.raises(ConfigError, match="batch_snr needs two"):
        measure(parts, params, {}, batches[:1])
    params["dense/kernel"] = params["dense/kernel"] * np.nan
    with pytest.raises(DivergedError, match="not a finite number, step 7"):
        measure(parts, params, {}, batches)


def moved(params, seed=0):
    rng = np.random.default_rng(seed)
    return {p: (x + rng.normal(size=x.shape) * 0.1).astype(np.float32) for p, x in params.items()}


def test_plasticity_equals_the_distance_of_activations_and_grows_as_the_model_moves():
    parts, params, stats = make_parts(dropout=0.5)
    reference = make_reference(params, stats)
    assert reference["params/head/kernel"].dtype == np.int8
    measured = make_plasticity(parts, make_parallel(devices=1), (1, 2))
    still = measured(params, stats, reference, BATCHES)
    later = measured(moved(params), stats, reference, BATCHES)
    assert set(still) == {1, 2}
    assert all(0 < still[stop] < 1e-2 * later[stop] for stop in still)
    net, images = TinyNet(), BATCHES[1]["image"][:13].astype(np.float32) / 255 - 0.5

    def gram(leaves):
        tree = {"params": {"stem": {"bn": {}, "conv": {}}}, "batch_stats": {"stem": {"bn": {}}}}
        for path, leaf in leaves.items():
            if path.startswith("stem/"):
                _, module, name = path.split("/")
                tree["params"]["stem"][module][name] = leaf
        for path, leaf in stats.items():
            if path.startswith("stem/"):
                tree["batch_stats"]["stem"]["bn"][path.split("/")[2]] = leaf
        rows = np.asarray(net.apply(tree, images, stop=1), np.float64).reshape(13, -1)
        product = rows @ rows.T
        return product / np.linalg.norm(product, axis=1, keepdims=True)

    scale = np.float32(reference["params/stem/conv/kernel#scale"])
    held = {**params, "stem/conv/kernel": reference["params/stem/conv/kernel"] * scale}
    wanted = np.sum((gram(moved(params)) - gram(held)) ** 2) / 13**2
    alone = measured(moved(params), stats, reference, BATCHES[1:2])
    assert alone[1] == pytest.approx(wanted, rel=1e-4)


def test_plasticity_does_not_depend_on_devices_or_padded_rows():
    parts, params, stats = make_parts()
    reference = make_reference(params, stats)
    one, many = (make_plasticity(parts, make_parallel(devices=n), [2, 1, 2]) for n in (1, 8))
    first = one(moved(params), stats, reference, BATCHES)
    assert one(moved(params), stats, reference, BATCHES) == first
    second = many(moved(params), stats, reference, BATCHES)
    assert second == pytest.approx(first, rel=1e-5)
    batch = dict(BATCHES[1], image=BATCHES[1]["image"].copy())
    batch["image"][13:] = 255 - batch["image"][13:]
    other = one(moved(params), stats, reference, [BATCHES[0], batch, BATCHES[2]])
    assert other == first


def test_plasticity_needs_stages_stops_and_numbers():
    parts, params, _ = linear()
    parallel = make_parallel(devices=1)
    with pytest.raises(ConfigError, match="part of its stages"):
        make_plasticity(parts, parallel, [1])
    parts, params, stats = make_parts()
    for wrong in ([], [0, 1]):
        with pytest.raises(ConfigError, match="give some, from 1 on"):
            make_plasticity(parts, parallel, wrong)
    measured = make_plasticity(parts, parallel, [1])
    reference = make_reference(params, stats)
    with pytest.raises(ConfigError, match="no batch"):
        measured(params, stats, reference, [])
    params["stem/conv/kernel"] = params["stem/conv/kernel"] * np.nan
    with pytest.raises(DivergedError, match="after stage 1"):
        measured(params, stats, reference, BATCHES)
