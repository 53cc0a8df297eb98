"""Evaluation is exact on padding, whatever the batches, and keeps the hardest examples."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.errors import DataError
from jft.evaluation import fetch_each, run_split
from jft.report.png import encode_png, thumbnail

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
        num_classes=3,
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
    assert table.confusion.sum() == 11


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
def test_the_batch_size_changes_nothing(batch_size):
    split = make_split()
    whole, cut = evaluate(split, 11), evaluate(split, batch_size)
    assert cut[0] == whole[0]
    assert [hard.example for hard in cut[1].hardest] == [hard.example for hard in whole[1].hardest]
    for name in ("label", "predicted", "probability", "confusion"):
        assert np.array_equal(getattr(cut[1], name), getattr(whole[1], name))


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


def test_the_hardest_are_the_highest_losses_in_order():
    split = make_split(40)
    _, table = evaluate(split, 7, hardest=5)
    loss = np.asarray(predict_step(split)["loss"])
    assert [hard.example for hard in table.hardest] == np.argsort(-loss, kind="stable")[:5].tolist()
    worst = table.hardest[0]
    assert np.array_equal(worst.image, split["image"][worst.example])
    probability = np.exp(split["logits"][worst.example]).max()
    probability /= np.exp(split["logits"][worst.example]).sum()
    assert worst.probability == pytest.approx(probability, rel=1e-6)


def test_a_loss_that_is_not_a_number_is_the_hardest_and_not_hidden(tmp_path):
    split = make_split(6)
    split["logits"][3] = np.nan
    scalars, table = evaluate(split, 4, workdir=tmp_path)
    assert math.isnan(scalars["loss"]) and table.hardest[0].example == 3
    content = json.loads((tmp_path / "eval/test.json").read_text(), parse_constant=pytest.fail)
    assert content["loss"] is None and content["hardest"][0]["loss"] is None


def test_files_hold_what_the_report_needs(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    split = make_split()
    scalars, table = evaluate(
        split, 4, workdir=tmp_path, step=70, example_id=lambda i: f"{i}.png", hardest=3
    )
    content = json.loads((tmp_path / "eval/test.json").read_text())
    assert {name: content[name] for name in scalars} == scalars
    assert (content["split"], content["step"], content["examples"]) == ("test", 70, 11)
    assert content["label_names"] == NAMES
    assert content["confusion"] == table.confusion.tolist()
    assert [row["name"] for row in content["per_class"]] == NAMES
    assert sum(row["support"] for row in content["per_class"]) == 11
    hard = content["hardest"][0]
    assert hard["id"] == f"{hard['example']}.png" and hard["image"] == "eval/test_hardest/0.png"
    with pil.open(tmp_path / hard["image"]) as image:
        assert np.array_equal(np.asarray(image), split["image"][hard["example"]])
    assert not list(tmp_path.rglob("*.tmp"))


def test_pictures_of_an_earlier_evaluation_do_not_stay(tmp_path):
    evaluate(make_split(), 4, workdir=tmp_path, hardest=4)
    evaluate(make_split(), 4, workdir=tmp_path, hardest=2)
    kept = sorted(path.name for path in (tmp_path / "eval/test_hardest").iterdir())
    assert kept == ["0.png", "1.png"]


def test_without_a_workdir_nothing_is_written_and_logits_are_kept_on_request():
    split = make_split()
    _, table = evaluate(split, 4, keep_logits=True)
    assert np.array_equal(table.logits, split["logits"])
    assert evaluate(split, 4)[1].logits is None


def test_an_empty_split_is_an_error_that_names_it():
    with pytest.raises(DataError, match="'test' has no examples"):
        run_split(predict_step, [], num_classes=3, label_names=NAMES, split="test")


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
