"""Weights from the hub, against a hub on this machine: checked, resumed, cached, and pinned."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Server
from safetensors.numpy import save

from jft.errors import WeightsError
from jft.weights import download, hub, hub_answers
from jft.weights.readers import read
from jft.weights.source import resolve

huggingface_hub = pytest.importorskip("huggingface_hub")

CONFIG = json.dumps({"hidden_size": 32}).encode()
SOURCE = "hf:owner/vit"


def tensors(count=1, size=4000, seed=0):
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.normal(size=size).astype(np.float32) for i in range(count)}


WEIGHTS = save(tensors())


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def site(server, tmp_path, monkeypatch):
    """An empty hub and an empty cache."""
    site, constants = server.hub, hub_answers.library().constants
    for store in (site.repos, site.requests, site.breaks, site.lies):
        store.clear()
    site.busy = False
    template = site.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": site.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "DOWNLOAD_CHUNK_SIZE": 512,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    return site


def offline(monkeypatch):
    monkeypatch.setattr(hub_answers.library().constants, "HF_HUB_OFFLINE", True)


def error_of(source=SOURCE):
    with pytest.raises(WeightsError) as caught:
        resolve(source)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600 and text.startswith(f"source {source!r}: "), text
    assert "Signature" not in text, "the key of a signed address is not shown"
    return text.removeprefix(f"source {source!r}: ")


def blobs(site_cache):
    return sorted(path.name for path in Path(site_cache).glob("hub/*/blobs/*"))


# --- what is fetched ---------------------------------------------------------------------------


def test_only_weights_and_their_json_are_fetched_and_the_commit_is_known(site):
    files = {
        "model.safetensors": WEIGHTS, "config.json": CONFIG, "modeling_vit.py": b"raise SystemExit",
        "pytorch_model.bin": b"x" * 2000, "tf_model.h5": b"y" * 2000, "README.md": b"hello",
    }  # fmt: skip
    commit = site.repo().commit(files)
    found = resolve(SOURCE)
    assert found.revision == commit and found.config == {"hidden_size": 32}
    assert found.preprocess is None and found.card is None
    np.testing.assert_array_equal(read(found)["w0"], tensors()["w0"])
    names = {path.rsplit("/", 1)[-1] for path in site.asked("GET", "/resolve/")}
    assert names == {"model.safetensors", "config.json"}
    assert not [p for p in site.asked("HEAD") if p.endswith((".py", ".bin", ".h5", ".md"))]


def test_the_key_of_the_user_is_not_sent_to_the_cdn(site, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    site.repo(token="hf_planted").commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    resolve(SOURCE)
    sent = {("/cdn/" in path, headers.get("authorization")) for _, path, headers in site.requests}
    assert sent == {(False, "Bearer hf_planted"), (True, None)}


def test_shards_come_by_the_index_and_pytorch_bin_last(site):
    parts = {f"m-{i}.safetensors": save({f"w{i}": tensors(2)[f"w{i}"]}) for i in range(2)}
    index = json.dumps({"weight_map": {"w0": "m-0.safetensors", "w1": "m-1.safetensors"}}).encode()
    files = {"model.safetensors.index.json": index, "config.json": CONFIG, **parts}
    site.repo().commit(files | {"other.safetensors": b"z" * 2000})
    found = resolve(SOURCE)
    assert set(read(found)) == {"w0", "w1"} and not site.asked("GET", "other")
    site.repo("owner/torch").commit({"pytorch_model.bin": b"x" * 2000, "config.json": CONFIG})
    assert resolve("hf:owner/torch").files[0].name == "pytorch_model.bin"
    del files["m-1.safetensors"]
    site.repo("owner/part").commit(files)
    assert "the shard 'm-1.safetensors'" in error_of("hf:owner/part")


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_an_index_cannot_ask_for_files_elsewhere(site, name):
    index = json.dumps({"weight_map": {"a": name}}).encode()
    site.repo().commit({"model.safetensors.index.json": index, "config.json": CONFIG})
    assert "not a file beside it" in error_of()


def test_a_path_inside_is_a_file_or_a_folder_with_its_own_json(site):
    files = {
        "big/model.safetensors": WEIGHTS, "big/config.json": b'{"a": 1}', "config.json": CONFIG,
        "augreg/B_16.npz": b"n" * 2000,
    }  # fmt: skip
    commit = site.repo().commit(files, "main", "feature/x")
    for source in (
        f"{SOURCE}/big",
        f"{SOURCE}@main/big/model.safetensors",
        f"{SOURCE}@{commit}/big/",
        f"{SOURCE}@feature%2Fx/big",
        "hf://owner/vit/big",
    ):
        found = resolve(source)
        assert found.files[0].name == "model.safetensors" and found.config == {"a": 1}, source
        assert found.revision == commit and hub.parse(hub.parse(source).text()) == hub.parse(source)
    found = resolve(f"{SOURCE}/augreg/B_16.npz")
    assert found.files[0].name == "B_16.npz" and found.config is None


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:vit", "expected hf:OWNER/NAME[@REVISION][/PATH]"),
        ("hf:", "expected hf:OWNER/NAME"),
        ("hf:owner/vit@", "expected hf:OWNER/NAME"),
        ("hf:../vit", "expected hf:OWNER/NAME"),
        ("hf:owner/..", "expected hf:OWNER/NAME"),
        ("hf:owner/vit/../../etc/passwd", "could leave the repository"),
        ("hf:owner/vit//etc", "could leave the repository"),
        ("hf:owner/vit/a\\..\\b", "could leave the repository"),
        ("hf:owner/vit/a\0b", "could leave the repository"),
        ("hf:owner/vit@..%2F..%2Fx", "no name of a revision"),
        ("hf:owner/vit@%2Fetc", "no name of a revision"),
    ],
)
def test_a_source_is_written_in_one_way_and_stays_in_its_repository(source, words):
    with pytest.raises(WeightsError) as caught:
        hub.parse(source)
    assert words in str(caught.value)


# --- what is checked ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_refused_and_leave_nothing_behind(site, tmp_path, name):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    site.breaks[name] = ["wrong"]
    assert f"{name}: its hash is not the one" in error_of()
    assert len(blobs(tmp_path)) == (0 if name == "config.json" else 1)
    assert read(resolve(SOURCE)), "the next try is a fresh one"


def test_more_bytes_than_declared_are_not_taken(site, tmp_path):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    site.breaks["model.safetensors"] = ["long"]
    assert f"more than {len(WEIGHTS):,} bytes came" in error_of()
    assert len(blobs(tmp_path)) == 1


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"X_Linked_Etag": '"abc"'}, "declares no size and hash"),
        ({"X_Linked_Etag": '"../../etc/x"'}, "declares no size and hash"),
        ({"X_Linked_Size": 1 << 60}, "at most"),
        ({"X_Linked_Size": "-5"}, "at most"),
        ({"X_Linked_Size": 1 << 37}, "is full"),
        ({"X_Repo_Commit": "f" * 40}, "answers with commit"),
    ],
)
def test_what_the_hub_declares_must_make_sense(site, monkeypatch, lie, words):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    site.lies["model.safetensors"] = lie
    monkeypatch.setattr(hub_answers.library().constants, "MAX_HTTP_DOWNLOAD_SIZE", 1 << 50)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 10**9))
    assert words in error_of()


def test_json_of_any_size_is_not_taken(site, monkeypatch):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    monkeypatch.setattr(hub, "JSON_BYTES", 10)
    assert "config.json: 19 bytes; at most 10" in error_of()


def test_a_damaged_cache_is_noticed_and_mended_or_named_without_network(
    site, tmp_path, monkeypatch, caplog
):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    path = resolve(SOURCE).path
    for _ in range(2):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        os.chmod(path, 0o644)
        path.resolve().write_bytes(bytes(content))
        if _ == 0:
            assert read(resolve(SOURCE)) and "is damaged" in caplog.text
            assert path.read_bytes() == WEIGHTS
    offline(monkeypatch)
    assert "does not hold model.safetensors" in error_of()


# --- broken connections ------------------------------------------------------------------------


def test_a_cut_connection_is_resumed_within_a_run(site):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    site.breaks["model.safetensors"] = ["cut:5000", "cut:700", "cut:0"]
    assert read(resolve(SOURCE))
    ranges = [h.get("range") for kind, path, h in site.requests if "/cdn/" in path]
    assert [r and int(r[6:-1]) // 512 for r in ranges if r] == [9, 10, 10]


def test_an_interrupted_download_goes_on_in_the_next_run(site, tmp_path):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    site.breaks["model.safetensors"] = ["cut:5000"] + ["cut:0"] * 5
    text = error_of()
    assert "model.safetensors broke off at byte 4,608 of" in text and "goes on from there" in text
    (partial,) = [name for name in blobs(tmp_path) if name.endswith(".incomplete")]
    site.requests.clear()
    assert read(resolve(SOURCE))
    (sent,) = [h for _, path, h in site.requests if "/cdn/" in path]
    assert sent["range"] == "bytes=4608-"
    assert partial not in blobs(tmp_path)


def test_a_busy_cdn_is_said_and_the_next_run_goes_on(site):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    site.breaks["model.safetensors"] = ["busy"]
    assert "model.safetensors broke off at byte 0 of" in error_of()
    assert read(resolve(SOURCE))


def test_rotten_or_oversized_beginnings_are_thrown_away(site, tmp_path):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    path = resolve(SOURCE).path.resolve()
    for rotten in (b"rotten" * 100, b"x" * (len(WEIGHTS) + 1), WEIGHTS[:-1] + b"?"):
        path.rename(path.with_name(path.name + ".incomplete"))
        path.with_name(path.name + ".incomplete").write_bytes(rotten)
        assert read(resolve(SOURCE)) and path.read_bytes() == WEIGHTS


def test_a_server_without_ranges_starts_anew(site):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    site.breaks["model.safetensors"] = ["cut:5000", "no ranges"]
    assert read(resolve(SOURCE))


@pytest.mark.parametrize("how", ["early", "late"])
def test_a_full_disk_is_said(site, monkeypatch, how):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    if how == "early":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
    else:

        def fail(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(download._Capped, "write", fail)
    text = error_of()
    assert "is full" in text and "HF_HOME" in text


# --- the cache ---------------------------------------------------------------------------------


def test_a_commit_in_the_cache_needs_no_network(site):
    commit = site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    first = resolve(f"{SOURCE}@{commit}")
    site.requests.clear()
    again = resolve(f"{SOURCE}@{commit}")
    assert not site.requests and again == first


def test_offline_the_cached_main_is_used_and_what_is_missing_is_said(site, monkeypatch):
    commit = site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    resolve(SOURCE)
    site.requests.clear()
    offline(monkeypatch)
    assert resolve(SOURCE).revision == commit
    assert "HF_HUB_OFFLINE is set" in error_of("hf:owner/vit@v2")
    assert "does not hold config.json" in error_of("hf:owner/vit@" + "0" * 40)
    assert not site.requests


@pytest.mark.parametrize("how", ["busy", "gone"])
def test_a_hub_that_does_not_answer_leaves_the_cache(site, monkeypatch, caplog, how):
    commit = site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    resolve(SOURCE)
    if how == "busy":
        site.busy = True
    else:
        monkeypatch.setattr(hub_answers.library().constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve(SOURCE).revision == commit
    assert "cannot be reached" in caplog.text and commit in caplog.text
    assert "cannot be reached" in error_of("hf:owner/other")


def test_a_cache_that_another_tool_filled_serves_offline_but_never_without_config(
    site, tmp_path, monkeypatch
):
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    huggingface_hub.hf_hub_download("owner/vit", "model.safetensors")
    offline(monkeypatch)
    assert "does not hold config.json" in error_of(), "epsilon could not be checked"
    monkeypatch.setattr(hub_answers.library().constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.hf_hub_download("owner/vit", "config.json")
    offline(monkeypatch)
    assert read(resolve(SOURCE))


def test_a_pinned_source_stays_where_it_was_when_main_moves(site):
    first = site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    before = resolve(SOURCE)
    second = site.repo().commit({"model.safetensors": save(tensors(seed=1)), "config.json": CONFIG})
    assert resolve(SOURCE).revision == second != first
    pinned = resolve(hub.pinned(SOURCE, first))
    assert pinned.revision == first and pinned.sha256() == before.sha256()
    assert hub.pinned("hf:owner/vit@main/a/b.npz", first) == f"hf:owner/vit@{first}/a/b.npz"
    assert hub.pinned("file:x", first) == "file:x" and hub.pinned(SOURCE, None) == SOURCE


# --- what the hub refuses ----------------------------------------------------------------------


def test_what_is_not_there_or_not_open_is_said_in_one_line(site):
    repo = site.repo()
    repo.commit({"config.json": CONFIG, "flax_model.msgpack": b"f"}, "main", "v1.0")
    site.repo("owner/private", token="hf_x").commit({"model.safetensors": WEIGHTS})
    site.repo("owner/gated", gated=True).commit({"model.safetensors": WEIGHTS})
    assert "has no repository 'owner/vti', or it is private: log in" in error_of("hf:owner/vti")
    assert "hf auth login" in error_of("hf:owner/private")
    gated = error_of("hf:owner/gated")
    assert f"accept its terms at {site.endpoint}/owner/gated, then log in" in gated
    assert "no revision 'v1.1' (did you mean 'v1.0'?)" in error_of("hf:owner/vit@v1.1")
    assert "no safetensors, npz or torch file" in error_of()
    repo.commit({"config.json": CONFIG, "weights/B_16.npz": b"n", "f.msgpack": b"f"})
    assert "name one: hf:owner/vit@main/weights/B_16.npz" in error_of()
    near = error_of("hf:owner/vit/weights/B16.npz")
    assert "no 'weights/B16.npz' (did you mean 'weights/B_16.npz'?)" in near
    assert "'f.msgpack' is no safetensors" in error_of("hf:owner/vit/f.msgpack")
    assert "no model.safetensors" in error_of("hf:owner/vit/weights")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"pip install 'jft\[hub\]'"):
        resolve(SOURCE)


def test_the_environment_of_the_command_line_is_honoured(site, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE in a process of its own, without jax."""
    site.repo().commit({"model.safetensors": WEIGHTS, "config.json": CONFIG})
    code = (
        "import sys; from jft.weights.source import resolve;"
        f"print(resolve({SOURCE!r}).path); assert 'jax' not in sys.modules"
    )
    env = os.environ | {"HF_ENDPOINT": site.endpoint, "HF_HOME": str(tmp_path / "home")}
    first = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    site.requests.clear()
    second = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert second.stdout == first.stdout and str(tmp_path / "home") in first.stdout
    assert not site.requests


# --- runs ----------------------------------------------------------------------------------------


def test_a_rebuilt_leaf_comes_from_the_commit_that_the_run_began_with(site, tmp_path, monkeypatch):
    import jft
    from jft.models.zoo import make_model
    from jft.weights.export import write_random

    def files(seed):
        args = {"patch": 4, "depth": 1, "image_size": 16}
        model = make_model(name="vit_tiny", args=args, num_classes=10)
        folder = write_random(model, tmp_path / f"seed-{seed}", seed)
        return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}

    def damage():
        one = min((workdir / "frozen").glob("*.safetensors"), key=lambda path: path.stat().st_size)
        one.write_bytes(one.read_bytes()[:-1] + b"?")

    first, workdir = site.repo().commit(files(0)), tmp_path / "run"
    keys = [f"init.source={SOURCE}", "model.args.depth=1", "freeze.phases=head", "train.steps=2"]
    keys += ["parallel.devices=1", "log.tensorboard=False", "eval.splits=[]"]
    jft.fit(jft.setup(jft.load_config("digits_vit:tiny", keys), workdir))
    conversion = json.loads((workdir / "conversion.json").read_text())
    assert conversion["revision"] == first and conversion["source"] == SOURCE
    assert f"commit    {first}" in conversion["text"]

    site.repo().commit(files(1))  # main moves on
    resolve(SOURCE)
    damage()
    site.requests.clear()
    jft.export(workdir, tmp_path / "out")
    assert not site.requests, "the commit is in the cache"
    card = json.loads((tmp_path / "out" / "jft.json").read_text())
    assert card["provenance"]["revision"] == first
    exported = read(resolve(f"file:{tmp_path / 'out'}"))
    original = read(resolve(f"file:{tmp_path / 'seed-0'}"))
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    np.testing.assert_array_equal(exported[name], original[name])

    conversion["sha256"] = "0" * 64  # as if the source held something else when the run began
    (workdir / "conversion.json").write_text(json.dumps(conversion))
    damage()
    with pytest.raises(WeightsError, match="has changed since the run started"):
        jft.export(workdir, tmp_path / "again")
