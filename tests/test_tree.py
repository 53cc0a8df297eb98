"""Paths, rules, split and merge."""

import numpy as np
import pytest

from jft import tree
from jft.errors import ConfigError

PARAMS = {
    "stem": {"kernel": np.zeros((3, 4), np.float32)},
    "blocks_1": {"attn": {"bias": np.zeros(4, np.float16)}},
    "blocks_10": {"attn": {"bias": np.zeros(5, np.float32)}},
    "head": {"bias": np.zeros(2, np.float32)},
}


def test_unflatten_inverts_flatten_and_paths_are_sorted():
    flat = tree.flatten(PARAMS)
    assert list(flat) == ["blocks_1/attn/bias", "blocks_10/attn/bias", "head/bias", "stem/kernel"]
    again = tree.unflatten(flat)
    assert tree.flatten(again).keys() == flat.keys()
    assert again["stem"]["kernel"] is PARAMS["stem"]["kernel"]


def test_a_slash_in_a_name_is_refused():
    with pytest.raises(ValueError, match="without '/'"):
        tree.flatten({"a/b": np.zeros(1)})


def test_merge_inverts_split_and_refuses_overlap():
    flat = tree.flatten(PARAMS)
    mask = {path: path.startswith("head") for path in flat}
    trainable, frozen = tree.split(flat, mask)
    assert list(trainable) == ["head/bias"]
    assert tree.flatten(tree.merge(trainable, frozen)) == flat
    with pytest.raises(ValueError, match="two parts"):
        tree.merge(trainable, flat)


def test_first_full_match_wins_and_prefixes_do_not_collide():
    rules = [("blocks_1/.*", "one"), ("blocks_.*", "block"), (".*", "rest")]
    found = tree.match(tree.flatten(PARAMS), rules, "optim.lr_rules")
    assert found["blocks_1/attn/bias"] == ("one", "blocks_1/.*")
    assert found["blocks_10/attn/bias"] == ("block", "blocks_.*")
    assert found["head/bias"] == ("rest", ".*")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("heads/bias", 1), (".*", 0)], "'heads/bias' matches no leaf .did you mean 'head/bias'"),
        ([("blocks_.*", 1), ("blocks_1/.*", 2), (".*", 0)], "never applies, 'blocks_.*' matches"),
        ([("head/.*", 1)], "no pattern matches the leaf 'blocks_1/attn/bias'"),
        ([("head/(", 1), (".*", 0)], "no regular expression"),
    ],
)
def test_bad_rules_are_named_with_their_key(rules, message):
    with pytest.raises(ConfigError, match=message) as error:
        tree.match(tree.flatten(PARAMS), rules, "optim.lr_rules")
    assert str(error.value).startswith("optim.lr_rules")
    assert error.value.exit_code == 2


def test_counts_and_bytes_follow_dtypes():
    flat = tree.flatten(PARAMS)
    assert tree.count_params(flat) == 12 + 4 + 5 + 2
    assert tree.count_bytes(flat) == 12 * 4 + 4 * 2 + 5 * 4 + 2 * 4
