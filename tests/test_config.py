"""Config: every key is checked, by file and by command line, and errors name the nearest key."""

import json
import textwrap

import pytest

from jft.config import arg_keys, base, diff, from_json, load_config, read_file, to_json
from jft.config_file import BUILTIN
from jft.errors import ConfigError
from jft.keys import KEYS, nearest_key
from jft.values import Key, key_of, plain

NAMES = sorted(path.stem for path in BUILTIN[1].glob("*.py"))


@pytest.fixture
def file(tmp_path):
    """Writes a config file whose body changes `config`, and returns its path."""

    def write(body="", arg="arg=''"):
        path = tmp_path / "own.py"
        body = textwrap.indent(textwrap.dedent(body), "    ")
        path.write_text(
            "from jft.config import base\n\n\n"
            f"def get_config({arg}):\n    config = base()\n    config.train.steps = 10\n"
            f"{body}\n    return config\n"
        )
        return str(path)

    return write


def error_of(*args):
    with pytest.raises(ConfigError) as caught:
        load_config(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def typos(name):
    """Every key with one letter of its last part dropped, doubled or swapped with the next."""
    stem, dot, last = name.rpartition(".")
    dropped = [last[:i] + last[i + 1 :] for i in range(len(last))]
    doubled = [last[: i + 1] + last[i:] for i in range(len(last))]
    swapped = [last[:i] + last[i + 1] + last[i] + last[i + 2 :] for i in range(len(last) - 1)]
    spelt = {text for text in dropped + doubled + swapped if text}
    return sorted(f"{stem}{dot}{text}" for text in spelt if f"{stem}{dot}{text}" not in KEYS)


def test_every_key_has_a_default_of_its_own_type_and_a_meaning():
    for name, key in KEYS.items():
        assert key.cast(key.default, name) == key.default
        assert key.doc and "\n" not in key.doc


def test_base_holds_every_key_with_its_default_and_shares_no_list():
    config = base()
    assert config.optim.learning_rate == KEYS["optim.learning_rate"].default
    config.init.fresh.append("head/.*")
    assert base().init.fresh == [] == KEYS["init.fresh"].default


def test_a_file_changes_only_what_it_sets(file):
    config = load_config(file("config.optim.learning_rate = 1"))
    assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
    assert config.train.batch_size == KEYS["train.batch_size"].default
    assert config.is_locked


def test_the_command_line_wins_over_the_file_and_the_last_word_over_the_first(file):
    path = file("config.seed = 1")
    assert load_config(path, ["--config.seed=2"]).seed == 2
    assert load_config(path, ["config.seed=2", "seed=3"]).seed == 3


@pytest.mark.parametrize(
    "text, section, key, value",
    [
        ("train.steps=1e4", "train", "steps", 10_000),
        ("optim.learning_rate=3", "optim", "learning_rate", 3.0),
        ("optim.learning_rate=3e-4", "optim", "learning_rate", 3e-4),
        ("augment.flip=false", "augment", "flip", False),
        ("augment.flip=True", "augment", "flip", True),
        ("optim.grad_clip_norm=None", "optim", "grad_clip_norm", None),
        ("optim.grad_clip_norm=null", "optim", "grad_clip_norm", None),
        ("checkpoint.best=none", "checkpoint", "best", None),
        ("data.path=1", "data", "path", "1"),
        ("data.path=a=b c", "data", "path", "a=b c"),
        ("augment.scale=[0.2, 1]", "augment", "scale", [0.2, 1]),
        ("augment.scale=(0.2, 1)", "augment", "scale", [0.2, 1]),
        ("eval.splits=val,test", "eval", "splits", ["val", "test"]),
        ("optim.lr_rules=[['head/.*', 2]]", "optim", "lr_rules", [["head/.*", 2]]),
        ("freeze.phases=head@30% | all", "freeze", "phases", "head@30% | all"),
        (
            "freeze.phases=['head', {'train': 'all'}]",
            "freeze",
            "phases",
            ["head", {"train": "all"}],
        ),
    ],
)
def test_a_text_becomes_the_value_of_its_key(file, text, section, key, value):
    found = load_config(file(), [text])[section][key]
    assert plain(found) == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("train.batch_size=many", "--config.train.batch_size should be int of at least 1"),
        ("train.batch_size=1.5", "not 1.5"),
        ("train.batch_size=0", "of at least 1"),
        ("train.batch_size=None", "not None"),
        ("train.batch_size=True", "not True"),
        ("train.batch_size='3'", "should be int"),
        ("train.batch_size=1e999", "should be int"),
        ("train.batch_size=", "should be int"),
        ("optim.learning_rate=nan", "should be float"),
        ("optim.learning_rate=-1", "of at least 0"),
        ("data.val_fraction=1.5", "from 0 to 1"),
        ("augment.flip=yes", "should be bool, not 'yes'"),
        ("augment.flip=1", "should be bool, not 1"),
        ("augment.crop=random", "one of none, random_resized"),
        ("augment.scale=[1", "should be list"),
        ("augment.scale=" + "[" * 20_000, "should be list"),
        ("augment.scale=[1, 0.5]", "two numbers, smallest first"),
        ("model.args=3", "should be dict"),
        ("optim=adamw", "--config.optim: no such key"),
        ("optim.learning_rate", "needs a value"),
        ("train.epochs=1", "both are set"),
        ("train.steps=None", "neither is set"),
        ("train.accum_steps=5", "does not divide"),
        ("data.test_fraction=0.9", "leave no training data"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_full_key(file, text, words):
    assert words in error_of(file(), [text])


@pytest.mark.parametrize("name", KEYS)
def test_every_typo_is_refused_and_nearly_all_name_the_key_that_was_meant(name, file):
    path, spelt = file(), typos(name)
    messages = [error_of(path, [f"--config.{typo}=1"]) for typo in spelt]
    assert all(typo in message for typo, message in zip(spelt, messages, strict=True))
    named = sum(f"(did you mean config.{name}?)" in message for message in messages)
    assert named >= 0.75 * len(spelt), messages


def test_typos_in_a_section_name_the_key_too():
    for wrong, right in {
        "optm.learning_rate": "optim.learning_rate",
        "learning_rate": "optim.learning_rate",
        "lr": "optim.learning_rate",
        "train.learning_rate": "optim.learning_rate",
        "optim.args.learning_rate": "optim.learning_rate",
        "batch_size": "train.batch_size",
        "parallel": "parallel.mode",
        "steps": "train.steps",
    }.items():
        assert nearest_key(wrong, KEYS) == f" (did you mean config.{right}?)"


@pytest.mark.parametrize(
    "line, words",
    [
        ("config.optim.learning_rat = 1", "own.py:7: config.optim.learning_rat: no such key (did"),
        ("config.optm.learning_rate = 1", "own.py:7: config.optm.learning_rate: no such key (did"),
        ("config.learning_rate = 1", "(did you mean config.optim.learning_rate?)"),
        ("config.train.batch_size = 'x'", "own.py:7: config.train.batch_size should be int"),
        ("config.train.batch_size = 1.5", "own.py:7: config.train.batch_size should be int"),
        ("config.update({'train': {'batchsize': 3}})", "own.py:7: config.train.batchsize"),
        ("config.optim = 3", "config.optim is a section"),
        ("config.init.fresh = [print]", "own.py:7: config.init.fresh should be list"),
        ("config.model.name = 'vit_ti15'", "own.py:7: config.model.name: no model 'vit_ti15' (did"),
        ("config.freeze.args = dict(kk=1)", "config.freeze.args.kk: no such key"),
        ("1 / 0", "own.py:7: ZeroDivisionError: division by zero"),
        ("raise ValueError('no variant')", "own.py:7: no variant"),
        ("import nothing_of_that_name", "own.py:7: ModuleNotFoundError"),
        ("raise SystemExit(3)", "own.py:7: SystemExit: 3"),
        ("return None", "own.py: get_config should return a ConfigDict or a dict"),
        ("def (", "own.py:7: invalid syntax"),
    ],
)
def test_an_error_in_a_file_names_file_and_line(file, line, words):
    assert words in error_of(file(line))


def test_a_file_may_return_a_plain_dict_of_what_it_changes(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def get_config():\n    return {'train': {'steps': 3}, 'seed': 4}\n")
    config = load_config(str(path))
    assert (config.train.steps, config.seed, config.loss.name) == (3, 4, "softmax")
    assert "takes no argument" in error_of(f"{path}:tiny")


def test_the_argument_after_the_colon_reaches_get_config(file):
    path = file("config.data.path = arg")
    assert load_config(f"{path}:a:b").data.path == "a:b"


def test_a_missing_file_or_name_is_named_with_the_nearest(file, tmp_path):
    path = file()
    assert "own.py" in error_of(path.replace("own.py", "onw.py"))
    assert "did you mean 'quickstart'" in error_of("quikstart")
    (tmp_path / "no_get.py").write_text("x = 1\n")
    assert "defines get_config" in error_of(str(tmp_path / "no_get.py"))
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    assert "is not text" in error_of(str(tmp_path / "bytes.py"))


def test_args_are_filled_from_the_signature_of_what_name_chooses(file):
    config = load_config(file(), ["freeze.name=last_k", "freeze.args.k=3"])
    assert config.freeze.args.to_dict() == {"k": 3}
    config = load_config(file(), ["optim.name=sgd"])
    assert config.optim.args.to_dict() == {"momentum": 0.9, "nesterov": False}
    config = load_config(file(), ["model.name=vit_s16", "model.args.patch=8"])
    assert config.model.args.patch == 8 and config.model.args.depth == 12


@pytest.mark.parametrize(
    "texts, words",
    [
        (["freeze.name=last_k", "freeze.args.kk=3"], "(did you mean 'k'?)"),
        (["freeze.name=last_k", "freeze.args.k=x"], "--config.freeze.args.k should be int"),
        (["freeze.args.k=3"], "--config.freeze.args.k: no such key; full takes none"),
        (["freeze.name=lp_ft", "freeze.args.q=3"], "q: no such key; lp_ft takes head_until, lr_"),
        (
            ["freeze.name=lp_ft", "freeze.phases=all"],
            "--config.freeze.name and --config.freeze.phases: give one of them",
        ),
        (
            ["freeze.name=last_kk"],
            "--config.freeze.name: no freeze 'last_kk' (did you mean 'last_k",
        ),
        (["optim.args.b3=1"], "(did you mean 'b"),
        (["loss.args.label_smoting=0.1"], "(did you mean 'label_smoothing'?)"),
        (["model.args.num_classes=3"], "no such key"),
        (["model.args.patch=8"], "no such key"),
        (["model.args={'patch': 8}"], "config.model.args.patch: no such key"),
    ],
)
def test_args_are_checked_against_that_signature(file, texts, words):
    assert words in error_of(file(), texts)


def test_another_name_on_the_command_line_drops_options_that_only_the_files_choice_had(file):
    path = file("config.optim.name, config.optim.args = 'sgd', {'nesterov': True}")
    assert load_config(path).optim.args.nesterov is True
    assert "nesterov" not in load_config(path, ["optim.name=adamw"]).optim.args
    assert "no such key" in error_of(path, ["optim.name=adamw", "optim.args.nesterov=True"])


def test_a_method_on_the_command_line_comes_before_the_files_own_phases(file):
    path = file("config.freeze.phases = 'head@30% | all'")
    assert load_config(path, ["freeze.name=lp_ft"]).freeze.phases is None
    assert load_config(path, ["freeze.phases=head"]).freeze.phases == "head"
    assert load_config(path, ["freeze.name=lp_ft", "freeze.phases=None"]).freeze.name == "lp_ft"
    # A saved config holds both, the phases of its own command line among them.
    assert load_config(path).freeze.phases == "head@30% | all"


def test_an_argument_that_is_a_number_or_a_text_keeps_what_it_was_given(file):
    for text, value in {"0.5": 0.5, "1": 1, "50%": "50%", "2ep": "2ep"}.items():
        config = load_config(file(), ["freeze.name=lp_ft", f"freeze.args.head_until={text}"])
        assert config.freeze.args.head_until == value
        assert type(config.freeze.args.head_until) is type(value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["", ":tiny"])
def test_every_built_in_config_loads_by_path_and_by_name_and_survives_json(name, variant):
    config = load_config(f"{BUILTIN[1] / name}.py{variant}")
    assert to_json(config) == to_json(load_config(name + variant))
    assert to_json(from_json(to_json(config))) == to_json(config)


def test_a_run_s_own_config_json_is_a_config(file, tmp_path):
    config = load_config(file("config.freeze.phases = 'head@30% | all'"))
    (tmp_path / "config.json").write_text(to_json(config))
    again = load_config(str(tmp_path / "config.json"), ["seed=1"])
    assert diff(config, again) == ["seed"]


def test_json_is_checked_like_a_file_and_nothing_in_it_is_executed():
    assert "no such key" in str(pytest.raises(ConfigError, from_json, '{"sede": 1}').value)
    for text in ("", "[]", "{", "[" * 100_000, '{"seed": NaN}', '{"seed": "!!python/name:os.x"}'):
        with pytest.raises(ConfigError):
            from_json(text)
    assert json.loads(to_json(base()))["seed"] == 0


def test_diff_lists_changed_keys_and_leaves_out_those_that_change_nothing_learned(file):
    old = load_config(file())
    new = load_config(file(), ["optim.args.b2=0.9", "train.batch_size=8", "log.tensorboard=false"])
    assert diff(old, new) == ["optim.args.b2", "train.batch_size"]
    assert diff(old, old) == []
    assert "optim.args.momentum" in diff(old, load_config(file(), ["optim.name=sgd"]))


def test_a_typo_made_after_loading_is_refused(file):
    config = load_config(file())
    with pytest.raises(AttributeError):
        config.optim.learning_rat = 1


def test_one_file_may_start_from_another(tmp_path, file):
    child = tmp_path / "child.py"
    child.write_text(
        "from jft.config import read_file\n"
        "def get_config(arg):\n"
        f"    config = read_file({file('config.seed = 5')!r}, arg)\n"
        "    config.train.batch_size = 7\n"
        "    return config\n"
    )
    config = load_config(str(child))
    assert (config.seed, config.train.batch_size) == (5, 7)


def test_key_of_reads_plain_parameters_and_no_others():
    assert key_of(int | None, None) == Key(None, int | None)
    assert key_of(tuple[int, ...], (1, 2)) == Key([1, 2], tuple[int, ...])
    assert key_of(object, 3) == Key(3, int)
    assert key_of(object, None) is None
    assert key_of(object, print) is None


def test_model_arguments_leave_out_what_jft_gives_itself():
    keys = arg_keys("model", "vit_b16")
    assert keys["patch"].default == 16
    assert not keys.keys() & {"num_classes", "dtype", "parent", "name", "image_size"}


def test_read_file_returns_what_get_config_gave(file):
    assert read_file(file("config.seed = 9")).seed == 9
