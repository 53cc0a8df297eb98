"""Evaluation is exact on padding, whatever the batches; hardest and easiest examples are kept."""

import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.errors import DataError
from jft.evaluation.split import EASIEST, HARDEST, fetch_each, run_split
from jft.report.png import encode_png, picture, thumbnail

NAMES = ["cat", "dog", "<script>alert(1)</script>"]


def make_split(examples=11, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (examples, 4, 5, 3), np.uint8),
        "label": random.integers(0, 3, examples).astype(np.int32),
        "logits": random.normal(size=(examples, 3)).astype(np.float32),
    }


def batches_of(split, batch_size, junk=0):
    total = len(split["label"])
    for start in range(0, total, batch_size):
        row = np.arange(start, start + batch_size)
        mask = (row < total).astype(np.float32)
        safe = np.minimum(row, total - 1)
        yield {
            "image": split["image"][safe],
            "label": np.where(mask > 0, split["label"][safe], junk).astype(np.int32),
            "logits": np.where(mask[:, None] > 0, split["logits"][safe], np.float32(np.nan)),
            "mask": mask,
            "example": row.astype(np.int32),
        }


@jax.jit
def _predict(logits, label):
    log_probability = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probability, label[:, None], axis=1)[:, 0]
    return {"logits": logits, "loss": -picked}


def predict_step(batch):
    return _predict(batch["logits"], batch["label"])


def evaluate(split, batch_size, **kwargs):
    return run_split(
        predict_step,
        batches_of(split, batch_size),
        label_names=NAMES,
        split="test",
        **kwargs,
    )


def test_scalars_equal_the_plain_means_over_the_examples():
    split = make_split()
    scalars, table = evaluate(split, 4)
    loss = np.asarray(predict_step(split)["loss"], np.float64)
    assert scalars["loss"] == pytest.approx(math.fsum(loss) / 11, rel=1e-7)
    assert scalars["accuracy"] == np.mean(split["logits"].argmax(1) == split["label"])
    assert table.example.tolist() == list(range(11))
    assert table.scored.confusion.sum() == 11


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
def test_the_batch_size_changes_nothing(batch_size):
    split = make_split()
    whole, cut = evaluate(split, 11), evaluate(split, batch_size)
    assert cut[0] == whole[0]
    assert [hard.example for hard in cut[1].hardest] == [hard.example for hard in whole[1].hardest]
    for name in ("predicted", "probability", "confusion"):
        assert np.array_equal(getattr(cut[1].scored, name), getattr(whole[1].scored, name))
    assert cut[1].to_dict(0) == whole[1].to_dict(0)


def test_one_batch_is_dispatched_before_the_one_before_is_fetched():
    events = []

    class Output:
        def __init__(self, index):
            self.index = index

        def __array__(self, *_args, **_kwargs):
            events.append(("fetch", self.index))
            return np.zeros(1)

    def step(batch):
        events.append(("dispatch", batch["index"]))
        return {"logits": Output(batch["index"])}

    seen = [batch["index"] for batch, _ in fetch_each(step, ({"index": i} for i in range(3)))]
    assert seen == [0, 1, 2]
    assert events == [
        ("dispatch", 0), ("dispatch", 1), ("fetch", 0), ("dispatch", 2), ("fetch", 1), ("fetch", 2)
    ]  # fmt: skip


def test_hardest_and_easiest_are_the_ends_of_the_order_of_losses():
    split = make_split(40)
    _, table = evaluate(split, 7)
    loss = np.asarray(predict_step(split)["loss"])
    order = np.argsort(-loss, kind="stable").tolist()
    assert [shown.example for shown in table.hardest] == order[:HARDEST]
    assert [shown.example for shown in table.easiest] == order[::-1][:EASIEST]
    for shown in (*table.hardest, *table.easiest):
        assert np.array_equal(shown.image, split["image"][shown.example])
    row = table.to_dict(0)["hardest"][0]
    worst = row["example"]
    probability = np.exp(split["logits"][worst]).max() / np.exp(split["logits"][worst]).sum()
    assert row["probability"] == pytest.approx(probability, rel=1e-6)
    assert (row["label"], row["loss"]) == (split["label"][worst], pytest.approx(loss[worst]))


def test_a_loss_that_is_not_a_number_is_the_hardest_and_not_hidden(tmp_path):
    split = make_split(6)
    split["logits"][3] = np.nan
    scalars, table = evaluate(split, 4, workdir=tmp_path)
    assert math.isnan(scalars["loss"]) and table.hardest[0].example == 3
    assert table.easiest[-1].example == 3
    content = json.loads((tmp_path / "eval/test.json").read_text(), parse_constant=pytest.fail)
    assert content["loss"] is None and content["hardest"][0]["loss"] is None


def test_files_hold_what_the_report_needs(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    split = make_split()
    scalars, table = evaluate(split, 4, workdir=tmp_path, step=70, example_id=lambda i: f"{i}.png")
    content = json.loads((tmp_path / "eval/test.json").read_text())
    assert {name: content[name] for name in scalars} == scalars
    assert (content["split"], content["step"], content["examples"]) == ("test", 70, 11)
    assert content["label_names"] == NAMES and content["kind"] == "class"
    assert content["confusion"] == table.scored.confusion.tolist()
    assert [row["name"] for row in content["per_class"]] == NAMES
    assert sum(row["support"] for row in content["per_class"]) == 11
    assert sum(row["examples"] for row in content["reliability"]) == 11
    assert {curve["name"] for curve in content["curves"]} == set(NAMES)
    for which in ("hardest", "easiest"):
        first = content[which][0]
        assert first["id"] == f"{first['example']}.png"
        assert first["image"] == f"eval/test_{which}/0.png"
        with pil.open(tmp_path / first["image"]) as image:
            assert np.array_equal(np.asarray(image), split["image"][first["example"]])
    assert not list(tmp_path.rglob("*.tmp"))


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_has_a_row_an_example_that_agrees_with_the_scores(tmp_path):
    split = make_split(30)
    scalars, table = evaluate(split, 4, workdir=tmp_path, example_id=lambda i: f"a, {i}.png")
    rows = read_csv(tmp_path / "eval/test_predictions.csv")
    assert [row["id"] for row in rows] == [f"a, {i}.png" for i in range(30)]
    right = [row["label"] == row["predicted"] for row in rows]
    assert np.mean(right) == scalars["accuracy"]
    for row in rows:
        shares = {name: float(row[f"p({name})"]) for name in NAMES}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert max(shares, key=shares.get) == row["predicted"]
        assert float(row["probability"]) == pytest.approx(max(shares.values()), rel=1e-5)
    losses = [float(row["loss"]) for row in rows]
    assert np.mean(losses) == pytest.approx(scalars["loss"], rel=1e-5)


def test_no_csv_is_written_of_more_rows_than_allowed_and_none_of_before_stays(tmp_path):
    evaluate(make_split(12), 4, workdir=tmp_path)
    assert (tmp_path / "eval/test_predictions.csv").exists()
    evaluate(make_split(12), 4, workdir=tmp_path, most_rows=11)
    assert not (tmp_path / "eval/test_predictions.csv").exists()
    assert json.loads((tmp_path / "eval/test.json").read_text())["predictions"] is None
    evaluate(make_split(12), 4, workdir=tmp_path, most_rows=None)
    content = json.loads((tmp_path / "eval/test.json").read_text())
    assert content["predictions"] == "eval/test_predictions.csv"


def of_kind(kind, tmp_path, examples=9):
    """Evaluates random outputs of labels that are not one class an image."""
    random = np.random.default_rng(4)
    label = random.integers(0, 2, (examples, 3)).astype(np.float32)
    logits = random.normal(size=(examples, 3)).astype(np.float32)
    if kind == "multi":
        label[2, 1] = np.nan
    batch = {
        "label": label, "mask": np.ones(examples), "example": np.arange(examples),
        "image": np.zeros((examples, 4, 4, 5), np.uint16),
    }  # fmt: skip
    outputs = {"logits": logits, "loss": np.arange(examples, dtype=np.float32)}
    names = ["a", "b", "c"]
    done = run_split(
        lambda _: outputs, [batch], label_names=names, split="val", kind=kind, workdir=tmp_path
    )
    content = json.loads((tmp_path / "eval/val.json").read_text())
    return label, logits, *done, content, read_csv(tmp_path / "eval/val_predictions.csv")


def test_several_classes_an_image_have_their_files_too(tmp_path):
    label, logits, scalars, _, content, rows = of_kind("multi", tmp_path)
    assert {name: content[name] for name in scalars} == scalars
    assert content["hardest"][0]["label"] == np.flatnonzero(label[8] == 1).tolist()
    assert content["hardest"][0]["predicted"] == np.flatnonzero(logits[8] > 0).tolist()
    assert [row["known"] for row in content["per_class"]] == [9, 8, 9]
    found = [set(filter(None, row["predicted"].split("; "))) for row in rows]
    assert found == [{n for n, x in zip("abc", row, strict=True) if x > 0} for row in logits]
    assert float(rows[0]["p(b)"]) == pytest.approx(1 / (1 + np.exp(-logits[0, 1])), rel=1e-5)


def test_numbers_have_their_files_too(tmp_path):
    label, logits, scalars, _, content, rows = of_kind("value", tmp_path)
    assert {name: content[name] for name in scalars} == scalars
    assert content["easiest"][0]["predicted"] == logits[0].tolist()
    assert [row["name"] for row in content["per_value"]] == ["a", "b", "c"]
    assert np.allclose(content["scatter"][1], np.stack([label[:, 1], logits[:, 1]], 1), rtol=1e-4)
    assert [float(row["predicted c"]) for row in rows] == pytest.approx(logits[:, 2], rel=1e-5)
    assert [float(row["c"]) for row in rows] == label[:, 2].tolist()


def test_pictures_of_an_earlier_evaluation_do_not_stay(tmp_path):
    evaluate(make_split(4), 4, workdir=tmp_path)
    evaluate(make_split(2), 4, workdir=tmp_path)
    kept = sorted(path.name for path in (tmp_path / "eval/test_hardest").iterdir())
    assert kept == ["0.png", "1.png"]


def test_without_a_workdir_nothing_is_written_and_all_logits_are_in_the_table():
    split = make_split()
    _, table = evaluate(split, 4)
    assert np.array_equal(table.predictions.logits, split["logits"])


def test_logits_beyond_the_limit_of_memory_come_from_a_file_with_the_same_scores(
    tmp_path, monkeypatch
):
    split = make_split(40)
    scalars, table = evaluate(split, 7)
    monkeypatch.setattr("jft.evaluation.split.MOST_LOGITS_BYTES", 100)
    mapped, again = evaluate(split, 7, workdir=tmp_path)
    assert isinstance(again.predictions.logits, np.memmap) and mapped == scalars
    assert np.array_equal(again.predictions.logits, table.predictions.logits)
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]


def test_eight_devices_evaluate_as_one_does():
    split = make_split(22, seed=3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("batch",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))

    def over_devices(batch):
        return _predict(*jax.device_put((batch["logits"], batch["label"]), rows))

    one, _ = evaluate(split, 8)
    eight, _ = run_split(over_devices, batches_of(split, 8), label_names=NAMES, split="test")
    assert eight == pytest.approx(one, rel=1e-6)


def test_an_empty_split_is_an_error_that_names_it():
    with pytest.raises(DataError, match="'test' has no examples"):
        run_split(predict_step, [], label_names=NAMES, split="test")


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 2), (5, 7, 3), (5, 7, 4), (5, 7, 6)])
def test_pngs_read_back_bitwise(tmp_path, shape):
    pil = pytest.importorskip("PIL.Image")
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (tmp_path / "x.png").write_bytes(encode_png(image))
    shown = image[..., 0] if image.ndim == 3 and shape[-1] in (1, 6) else image
    with pil.open(tmp_path / "x.png") as read:
        assert np.array_equal(np.asarray(read), shown)


def test_thumbnails_shrink_by_box_means_and_leave_small_images_alone():
    small = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28, 1)
    assert thumbnail(small) is small
    large = np.zeros((320, 200, 3), np.uint8)
    large[:, ::2] = 100
    shrunk = thumbnail(large)
    assert shrunk.shape == (160, 100, 3) and np.all(shrunk == 50)
    assert thumbnail(np.zeros((1, 500, 3), np.uint8)).shape == (1, 125, 3)


@pytest.mark.parametrize("bands, shown", [(1, 1), (2, 1), (3, 3), (4, 3), (13, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_show_three_bands_or_one_of_any_depth(bands, shown, dtype):
    image = np.random.default_rng(0).integers(0, 200, (9, 7, bands)).astype(dtype)
    made = picture(image)
    assert made.dtype == np.uint8 and made.shape == (9, 7, shown)
    if dtype == np.uint8:
        assert np.array_equal(made, image[..., :shown])
    else:  # 200 of 65,535 would be black
        assert made.min() == 0 and made.max() == 255
    assert np.all(picture(np.full((2, 2, bands), 7, np.uint16)) == 0)
