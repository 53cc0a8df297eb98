"""Groups, set expressions, masks and phases."""

import functools

import jax
import numpy as np
import pytest

from jft.errors import ConfigError
from jft.freeze.explain import explain
from jft.freeze.groups import make_groups
from jft.freeze.masks import make_mask
from jft.freeze.methods import METHODS, make_phases
from jft.models.zoo import FAMILIES, make_model
from jft.tree import flatten

PATHS = ["stem/kernel", "stem/bn/scale", "stem/bn/bias"]
PATHS += [
    f"blocks_{i}/{leaf}" for i in range(12) for leaf in ("attn/kernel", "attn/bias", "norm1/scale")
]
PATHS += ["head/kernel", "head/bias"]
STRUCTURE = (("stem", r"stem/.*"), ("block", r"blocks_(\d+)/.*"), ("head", r"head/.*"))


@pytest.fixture
def groups():
    return make_groups(PATHS, STRUCTURE)


def trained(mask):
    return {path for path, trains in mask.items() if trains}


def test_every_leaf_is_in_one_structural_group_in_network_order(groups):
    assert groups.order == ("stem", *(f"block[{i}]" for i in range(12)), "head")
    assert sorted(p for name in groups.order for p in groups.members[name]) == sorted(PATHS)
    assert groups.counts == {"block": 12}
    assert groups.patterns["blocks_10/attn/bias"] == ("block[10]", r"blocks_(\d+)/.*")


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("head", {"head/kernel", "head/bias"}),
        ("all", set(PATHS)),
        ("block[1]", {p for p in PATHS if p.startswith("blocks_1/")}),
        ("block[-1] + head", {p for p in PATHS if p.startswith(("blocks_11/", "head"))}),
        (
            "block[-3:]",
            {p for p in PATHS if p.startswith(("blocks_9/", "blocks_10/", "blocks_11/"))},
        ),
        ("all - block - head", {p for p in PATHS if p.startswith("stem")}),
        (
            "bias & block[:2] + head",
            {"blocks_0/attn/bias", "blocks_1/attn/bias", "head/kernel", "head/bias"},
        ),
        ("bias & (block[0] + head)", {"blocks_0/attn/bias", "head/bias"}),
        ("'.*_1/attn/kernel'", {"blocks_1/attn/kernel"}),
        ("norm", {p for p in PATHS if "norm" in p or "bn" in p}),
    ],
)
def test_set_expressions_mean_sets_of_leaves(groups, expression, expected):
    mask = make_mask(expression, groups)
    assert list(mask) == PATHS
    assert trained(mask) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("heads", "no group 'heads' .did you mean 'head'"),
        ("block[12]", r"'block\[12\]' is empty; the model has block\[0\] .. block\[11\]"),
        ("block[-13:]", "is empty"),
        ("block[x]", "should be like"),
        ("head[0]", "not numbered"),
        ("head +", "a group is missing"),
        ("(head", r"a '\)' is missing"),
        ("head head", "unexpected 'head'"),
        ("head * 2", r"unexpected '\*'"),
        ("head - head", "nothing to train"),
        ("'kernell'", "matches no leaf"),
        ("", "a group is missing"),
    ],
)
def test_bad_expressions_name_key_and_nearest(groups, expression, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_mask(expression, groups, "freeze.phases[0]")
    assert str(error.value).startswith("freeze.phases[0]")


def test_rules_give_the_same_mask_as_the_expression(groups):
    rules = [["head/.*", True], ["blocks_1[01]/.*", True], [".*", False]]
    assert make_mask(rules, groups) == make_mask("block[10:] + head", groups)
    with pytest.raises(ConfigError, match="true or false"):
        make_mask([["head/.*", 1], [".*", 0]], groups)


def test_user_groups_join_and_must_match(groups):
    with_extra = make_groups(PATHS, STRUCTURE, extra=[("low", r"blocks_[0-3]/.*")])
    assert with_extra.resolve("low") == groups.resolve("block[:4]")
    with pytest.raises(ConfigError, match="freeze.groups.low"):
        make_groups(PATHS, STRUCTURE, extra=[("low", "nothing")])
    for name in ("my-top", "2nd", "", 3):
        with pytest.raises(ConfigError, match="should be a letter, then letters, digits and _"):
            make_groups(PATHS, STRUCTURE, extra=[(name, "head/.*")])


def test_a_model_without_a_family_gets_one_group_a_module():
    groups = make_groups(["b/kernel", "b/bias", "a/kernel"])
    assert groups.order == ("b", "a")
    assert trained(make_mask("bias + a", groups)) == {"b/bias", "a/kernel"}


def phases(groups, **kw):
    return make_phases(groups, total_steps=200, steps_per_epoch=16, **kw)


def test_the_string_form_expands_to_steps(groups):
    plan = phases(groups, phases="head@30% | block[-3:]+head@8ep | all - stem@190 | all")
    assert [(p.start_step, p.stop_step) for p in plan] == [
        (0, 60),
        (60, 128),
        (128, 190),
        (190, 200),
    ]
    assert [p.name for p in plan] == ["head", "block[-3:]+head", "all - stem", "all"]


def test_a_whole_number_is_steps_and_not_a_fraction(groups):
    assert phases(groups, phases="head@1 | all")[0].stop_step == 1
    assert phases(groups, phases=[{"train": "head", "until": 1}, "all"])[0].stop_step == 1


def test_list_and_string_forms_agree(groups):
    listed = [{"train": "head", "until": 0.3}, {"train": "all"}]
    assert phases(groups, phases=listed) == phases(groups, phases="head@30%|all")
    assert phases(groups, phases=listed) == phases(groups, name="lp_ft", args={"head_until": 60})


def test_leaves_remember_the_phase_they_entered(groups):
    plan = phases(groups, phases="head@50 | all@100 | head@150 | all")
    assert {p.entered["head/bias"] for p in plan} == {"0"}
    assert [p.entered.get("stem/kernel") for p in plan] == [None, "1", None, "3"]
    reset = phases(
        groups, phases=[{"train": "head", "until": 50}, {"train": "all", "state": "reset"}]
    )
    assert set(reset[1].entered.values()) == {"1"}


def test_last_k_trains_what_lies_above(groups):
    plan = phases(groups, name="last_k", args={"k": 2})
    assert trained(plan[0].mask) == trained(make_mask("block[-2:] + head", groups))


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"phases": "head | all"}, r"phases\[0\]: 'until' is missing"),
        ({"phases": "head@30% | all@20%"}, "ends at step 40"),
        ({"phases": "head@30% | stem@20% | all"}, "must be after step 60"),
        ({"phases": "head@300 | all"}, "at most 200"),
        ({"phases": "head@soon | all"}, "until='soon' should be"),
        ({"phases": "head@0 | all"}, "until='0' should be"),
        ({"phases": [{"trian": "head"}]}, "unknown key 'trian' .did you mean 'train'"),
        ({"phases": [{"train": "head", "lr_scale": 0}]}, "lr_scale: 0 should be a number above 0"),
        ({"phases": []}, "there is no phase"),
        ({"name": "lpft"}, "no method 'lpft' .did you mean 'lp_ft'"),
        ({"name": "last_k", "args": {"n": 1}}, "freeze.args"),
        ({"name": "last_k", "args": {"k": 0}}, "freeze.args.k"),
        (
            {"name": "lp_ft", "args": {"lr_scale": -1.0}},
            "lr_scale: -1.0 should be a number above 0",
        ),
    ],
)
def test_bad_phases_are_named(groups, kw, message):
    with pytest.raises(ConfigError, match=message):
        phases(groups, **kw)


def test_the_explain_table_says_where_each_leaf_trains_and_why(groups):
    plan = phases(groups, phases="head@50 | block[-2:] + bias + head")
    shapes = {path: np.zeros((2, 3), np.float32) for path in PATHS}
    rates = dict.fromkeys(PATHS, [0.1]) | {"head/bias": [0.2]}
    decays = dict.fromkeys(PATHS, 0.0)
    table = str(explain(groups, plan, shapes, rates, decays)).splitlines()
    rows = {line.split("  ")[0]: line for line in table}
    assert rows["block[0]"].split()[-4:] == ["-", "1", "of", "3"]
    assert rows["block[11]"].split()[-2:] == ["-", "train"]
    assert "0.1-0.2" in rows["head"] and rows["head"].endswith("train    train")
    assert rows["all"].split()[-2:] == ["12", "114"]
    leaves = str(explain(groups, plan, shapes, rates, decays, every_leaf=True)).splitlines()
    assert len(leaves) == len(PATHS) + 2
    assert any("blocks_10/attn/bias" in line and r"blocks_(\d+)/.*" in line for line in leaves)


@functools.cache
def groups_of(family):
    found = FAMILIES[family]
    model = make_model(name=sorted(found.variants)[0], num_classes=3)
    size = model.preprocess.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    paths = flatten(jax.eval_shape(model.init, jax.random.key(0), image)["params"])
    return make_groups(paths, found.groups, found.sets)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_method_fits_every_family(family, method):
    groups = groups_of(family)
    if method == "attention_only" and "attn" not in groups.members:
        with pytest.raises(ConfigError, match="freeze.name: attention_only needs a group 'attn'"):
            phases(groups, name=method)
        return
    assert phases(groups, name=method)[-1].stop_step == 200
