"""Paths, groups and strict comparison of parameter trees."""

import jax
import jax.numpy as jnp
import pytest

from vgen import trees
from vgen.config import UserError

TREE = {"b": {"w": jnp.ones((2, 3)), "v": jnp.zeros(4)}, "a": {"w": jnp.ones(5, jnp.bfloat16)}}


def test_flatten_sorts_and_unflatten_inverts():
    flat = trees.flatten(TREE)
    assert list(flat) == ["a/w", "b/v", "b/w"]
    assert jax.tree.structure(trees.unflatten(flat)) == jax.tree.structure(TREE)


def test_subtree_takes_whole_names_and_add_prefix_inverts():
    flat = {"a/w": 1, "ab/w": 2, "a/b/w": 3}
    assert trees.subtree(flat, "a") == {"w": 1, "b/w": 3}
    assert trees.add_prefix(trees.subtree(flat, "a"), "a") == {"a/w": 1, "a/b/w": 3}
    assert trees.subtree(flat, "") == trees.add_prefix(flat, "") == flat


def test_first_full_match_wins():
    groups = {"first": "a/.*", "rest": ".*"}
    assert trees.group_paths(["a/w", "xa/w", "b"], groups) == {"first": ["a/w"], "rest": ["xa/w", "b"]}
    with pytest.raises(UserError, match=r"group 'none' \('c'\) matches no parameter; there are e\.g\. \['a/w'\]"):
        trees.group_paths(["a/w"], {"none": "c"})


def test_counts():
    assert trees.count(TREE) == 15
    assert trees.num_bytes(TREE) == 4 * 10 + 2 * 5
    assert trees.count(jax.eval_shape(lambda: TREE)) == 15


def test_check_same_lists_everything_wrong():
    want = {"a": jnp.ones(2), "b": jnp.ones(3), "d": jnp.ones(1)}
    trees.check_same(want, want, "it")
    with pytest.raises(
        UserError, match=r"^it does not fit: missing b \(3,\); unexpected c \(1,\); a: got \(5,\), expected"
    ):
        trees.check_same({"a": jnp.ones(5), "c": jnp.ones(1), "d": jnp.ones(1)}, want, "it")
    many = {f"p{i}": jnp.ones(1) for i in range(30)}
    with pytest.raises(UserError, match=r"\(and 10 more\)"):
        trees.check_same({}, many, "it")
