"""The torch reader: honest files exactly, everything else refused without side effects."""

import os
import pickletools
import tracemalloc
from pathlib import Path

import hostile_torch as make
import numpy as np
import pytest

from jft.errors import WeightsError
from jft.weights import torch_file, torch_pickle
from jft.weights.readers import read_file
from jft.weights.torch_file import read_torch


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_honest_file_is_read_exactly(tmp_path, layout):
    path = tmp_path / "weights.anything"
    path.write_bytes(make.honest()[layout])
    for read in (read_torch, read_file):
        arrays = read(path)
        assert list(arrays) == ["w"]
        np.testing.assert_array_equal(arrays["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
        assert not arrays["w"].flags.writeable


def test_views_transposes_scalars_and_empty_tensors_keep_their_values(tmp_path):
    views = {
        "transposed": make.tensor(make.storage(), (3, 2), (1, 3)),
        "row": make.tensor(make.storage(), (3,), (1,), offset=3),
        "scalar": make.tensor(make.storage(), (), (), offset=5),
        "empty": make.tensor(make.storage(), (0, 3), (3, 1)),
    }
    pickled = make.state_dict(
        make.tensor(make.storage()) + b"".join(make.text(k) + v for k, v in views.items())
    )
    path = tmp_path / "views.pt"
    path.write_bytes(make.archive(pickled))
    arrays = read_torch(path)
    np.testing.assert_array_equal(arrays["transposed"], arrays["w"].T)
    np.testing.assert_array_equal(arrays["row"], arrays["w"][1])
    assert arrays["scalar"].shape == () and arrays["scalar"] == 5
    assert arrays["empty"].shape == (0, 3)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "ema_of_mine"])
def test_state_dict_is_found_inside_a_wrapper(tmp_path, wrapper):
    inner = make.state_dict(make.tensor(make.storage()))[2:-1]
    pickled = (
        b"\x80\x02}(" + make.text("epoch") + make.number(3) + make.text(wrapper) + inner + b"u."
    )
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(make.archive(pickled))
    assert list(read_torch(path)) == ["w"]


@pytest.mark.slow  # the test of hostile weights has these files too
def test_every_hostile_file_is_refused_without_side_effect_in_bounded_memory(tmp_path):
    marker = tmp_path / "ran"
    files = make.hostile(marker)
    assert len(files) >= 40
    path = tmp_path / "weights.pth"
    for what, content in files.items():
        path.write_bytes(content)
        before = set(os.listdir(tmp_path))
        tracemalloc.start()
        try:
            with pytest.raises(WeightsError) as caught:
                read_file(path)
                pytest.fail(f"accepted: {what}")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < (64 << 20), f"{what}: {peak} bytes"
        message = str(caught.value)
        assert "\n" not in message and str(path) in message and len(message) < 600, what
        if len(content) < make.LONG:
            with pytest.raises(WeightsError):
                read_torch(path)
        assert not marker.exists(), what
        assert set(os.listdir(tmp_path)) == before, what


def test_code_files_do_run_code_in_an_unpickler(tmp_path):
    """The oracle of the test above: its files are not harmless by accident."""
    import pickle

    marker = tmp_path / "ran"
    pickled = make._code(marker)["reduce of os.system"]
    pickle.loads(pickled)
    assert marker.exists()


def test_reader_never_imports_or_unpickles():
    for module in (torch_file, torch_pickle):
        source = Path(module.__file__).read_text(encoding="utf-8")
        for word in (
            "Unpickler",
            "import pickle\n",
            "pickle.load",
            "getattr(",
            "__import__",
            "eval(",
        ):
            assert word not in source, (module.__name__, word)
    assert torch_pickle.pickletools is pickletools


REASONS = {
    "zip: reduce of os.system": r"os\.system",
    "zip: stride beyond the storage": "reaches beyond its end",
    "zip: overflowing shape": "claims 73786976294838206464 bytes where there are 24",
    "zip: a key that cannot be hashed": "a dict key is a list",
    "zip: a deep tuple as key": "a dict key is a tuple",
    "zip: a member twice": "'archive/data/0' occurs twice",
    "zip: a bomb": "zip bomb",
    "zip: directory of two gigabytes": "its zip directory is larger",
    "zip: a flipped bit": "its checksum differs",
    "zip: torchscript": "a TorchScript program",
    "legacy: big endian": "big-endian machine",
    "legacy: cut in the storage": "a cut download",
}


def test_refusal_gives_the_reason_found_by_the_check_meant_for_it(tmp_path):
    path = tmp_path / "weights.pth"
    files = make.hostile(tmp_path / "ran")
    for what, reason in REASONS.items():
        path.write_bytes(files[what])
        with pytest.raises(WeightsError, match=reason):
            read_file(path)


def test_every_cut_of_an_honest_file_is_refused(tmp_path):
    path = tmp_path / "cut.pth"
    for content in make.honest().values():
        for length in range(0, len(content), 7):
            path.write_bytes(content[:length])
            with pytest.raises(WeightsError):
                read_file(path)


def test_flipped_bytes_give_an_array_or_a_clear_refusal(tmp_path):
    """Whatever a damaged file says, nothing but WeightsError comes out."""
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.pth"
    for content in make.honest().values():
        for _ in range(300):
            damaged = bytearray(content)
            for at in rng.integers(0, len(content), rng.integers(1, 4)):
                damaged[at] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(bytes(damaged))
            try:
                arrays = read_file(path)
            except WeightsError:
                continue
            assert all(array.nbytes <= len(content) for array in arrays.values())
