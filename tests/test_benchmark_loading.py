"""The benchmark of loading: its arms load the same numbers, and its smoke form runs."""

import json

import jax
import numpy as np
import pytest

from benchmarks import loading
from jft.tree import flatten


@pytest.mark.slow
def test_the_smoke_form_measures_every_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "measured_peak", lambda *_: 1)  # a process each
    out = tmp_path / "result.json"
    assert loading.main(["--suite", "smoke", "--arms", "jft", "bare", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    names = [row["row"] for row in result["rows"]]
    assert names[:3] == [row.name for row in loading.ROWS[:3]]
    for row in result["rows"]:
        assert set(row["seconds"]) == {"jft", "bare"} and row["file_bytes"] > 0
        assert row["time_ratio"]["bare"]["ratio"] > 0
    printed = capsys.readouterr().out
    assert "| safetensors bfloat16 -> float32 |" in printed


def test_the_arms_load_the_same_numbers(tmp_path):
    suite = loading.SUITES["smoke"]
    files = loading.write_files(suite, tmp_path)
    for row in loading.ROWS:
        folder = files.get((row.kind, row.stored))
        if folder is None:
            continue
        bare = loading.load_bare(suite, row, folder)
        variables, report = loading.load_jft(suite, row, folder)
        assert loading.load_hashed(suite, row, folder)[1] == report.sha256
        ours = flatten(variables["params"])
        assert sum(array.size for array in bare.values()) == sum(
            leaf.size for leaf in ours.values()
        )
        total = sum(float(np.sum(array, dtype=np.float64)) for array in bare.values())
        found = sum(float(np.sum(leaf, dtype=np.float64)) for leaf in ours.values())
        assert abs(total - found) < 1e-6 * sum(array.size for array in bare.values())
        placed, _ = loading.load_placed(suite, row, folder)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))
        assert {leaf.dtype for leaf in ours.values()} == {loading.DTYPES[row.wanted]}
