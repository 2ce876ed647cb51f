"""Selectors: what they match, how they print, compare and fail."""

import jax
import numpy as np
import pytest

import transferjax as tj
from transferjax.tree import as_selector, matches

TABLE = [
    ("head", "head", "heads head/kernel my/head hea"),
    ("head/**", "head head/kernel head/fc/bias", "heads heads/kernel my/head/kernel"),
    ("head/*", "head/kernel head/fc", "head head/fc/bias heads/kernel"),
    ("**/kernel", "kernel a/kernel a/b/kernel", "kernels a/mykernel a/kernel/x"),
    ("**/lora/**", "lora a/lora lora/a a/lora/b/c", "notlora/a a/loraxmore a/lora1x/b notlora"),
    ("lora*", "lora loraxmore lora1x", "notlora a/lora lora/a"),
    ("lora?", "lora1 loraa", "lora lora12 lora/"),
    (
        "blocks/**/kernel",
        "blocks/kernel blocks/0/kernel blocks/0/attn/kernel",
        "blocks blocks/0 block/kernel blockskernel",
    ),
    ("**", "a a/b a/b/c", ""),
    ("**/**", "a a/b", ""),
    ("a/**/**/z", "a/z a/b/z a/b/c/z", "a z az"),
    ("**/a/**", "a a/b x/a x/y/a/b", "ab x/ab/y"),
    ("blocks/*", "blocks/0", "blocks/0/kernel blocks"),
    ("{head,stem}/kernel", "head/kernel stem/kernel", "headstem/kernel {head,stem}/kernel neck/kernel"),
    ("{blocks/0,head}/kernel", "blocks/0/kernel head/kernel", "blocks/1/kernel blocks/kernel"),
    ("{a,b{c,d}}", "a bc bd", "b bcd"),
    ("{blocks/**,head}/bias", "blocks/bias blocks/1/bias head/bias", "head/x/bias"),
    ("blocks/{2..11}/w", "blocks/2/w blocks/9/w blocks/11/w", "blocks/1/w blocks/12/w blocks/02/w blocks/111/w"),
    ("layer_{08..11}", "layer_08 layer_09 layer_10 layer_11", "layer_8 layer_9 layer_12 layer_010"),
    ("block[0-3]", "block0 block3", "block4 block01 block-"),
    ("block[!0-3]", "block4 blockx", "block0 block block/"),
    ("block[^0-3]", "block4", "block3 block/"),
    ("x[[&|~]", "x[ x& x| x~", "x x["[:1]),
    ("a.b", "a.b", "axb a/b"),
    ("(a+b)", "(a+b)", "aab ab"),
]


@pytest.mark.parametrize("pattern, yes, no", TABLE, ids=[row[0] for row in TABLE])
def test_a_glob_matches_whole_segments(pattern, yes, no):
    selector = tj.glob(pattern)
    assert [path for path in yes.split() if not selector(path)] == []
    assert [path for path in no.split() if selector(path)] == []


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: tj.glob(""), r"the glob is empty. Write '\*\*' for everything."),
        (lambda: tj.glob("{a,b"), r"glob '{a,b' has a brace without its partner. Write alternatives as '{a,b}'."),
        (lambda: tj.glob("a}b{"), r"glob 'a}b{' has a brace without its partner"),
        (lambda: tj.glob("x/{5..2}"), r"glob 'x/{5..2}' has the empty range {5..2}. Write the smaller number first."),
        (lambda: tj.glob("x[9-0]"), r"glob 'x\[9-0\]' has a set that does not compile: bad character range"),
        (lambda: tj.regex("(a"), r"regex '\(a' does not compile: .* Write a Python regular expression."),
        (lambda: tj.where(3), r"where\(\) expects a function \(path, leaf\) -> bool, got int."),  # type: ignore
        (lambda: as_selector(3), "expected a selector or a glob such as 'head/[*][*]', got int. Build one with"),
    ],
)
def test_what_is_no_selector_raises(build, message):
    with pytest.raises(tj.SelectionError, match=message):
        build()


def test_a_selector_that_matches_nothing_names_the_nearest_paths():
    tree = {"head": {"bias": 1.0, "kernel": 2.0}, "stem": {"kernel": 3.0}}
    for function in (matches, tj.mask, tj.split):
        with pytest.raises(tj.SelectionError) as error:
            function(tree, "heda/**")
        assert str(error.value) == (
            "selector 'heda/**' matched none of 3 parameters. Nearest: head/bias, head/kernel, stem/kernel."
        )
    with pytest.raises(tj.SelectionError, match="matched none of 1 parameter"):
        matches({"head": 1.0}, "hat")


def test_selectors_combine_print_compare_and_hash():
    head, bias = tj.glob("head/**"), tj.where(lambda path, leaf: path.endswith("bias"), "biases")
    tree = {"head": {"bias": 1, "kernel": 2}, "stem": {"bias": 3, "kernel": 4}}
    table = [
        (head | bias, "('head/**' | where(biases))", ["head/bias", "head/kernel", "stem/bias"]),
        (head & bias, "('head/**' & where(biases))", ["head/bias"]),
        (head & ~bias, "('head/**' & ~where(biases))", ["head/kernel"]),
        (~head, "~'head/**'", ["stem/bias", "stem/kernel"]),
        ("stem/kernel" | bias, "('stem/kernel' | where(biases))", ["head/bias", "stem/bias", "stem/kernel"]),
        ("stem/*" & ~bias, "('stem/*' & ~where(biases))", ["stem/kernel"]),
        (head | "stem/bias", "('head/**' | 'stem/bias')", ["head/bias", "head/kernel", "stem/bias"]),
        (tj.everything, "everything", ["head/bias", "head/kernel", "stem/bias", "stem/kernel"]),
        (tj.regex("st.m/.*"), "regex('st.m/.*')", ["stem/bias", "stem/kernel"]),
    ]
    for selector, text, found in table:
        assert (repr(selector), matches(tree, selector)) == (text, found)
    assert tj.glob("a") == tj.glob("a") != tj.glob("b")
    assert tj.glob("a") != tj.regex("a")
    assert {head | bias, head | bias, ~head, ~head} == {head | bias, ~head}
    assert tj.where(np.isscalar) == tj.where(np.isscalar) != tj.where(np.isscalar, "other")


def test_a_selector_may_look_at_shape_and_dtype_of_abstract_leaves():
    vectors = tj.where(lambda path, leaf: leaf.ndim == 1 and leaf.dtype == "float32", "vectors")
    tree = jax.eval_shape(lambda: {"a": np.zeros(3, np.float32), "b": np.zeros((3, 3), np.float32)})
    assert tj.mask(tree, vectors) == {"a": True, "b": False}


def test_labels_are_total_and_disjoint():
    tree = {"head": {"bias": 1, "kernel": 2}, "stem": [3, 4]}
    assert tj.label(tree, {"new": "head/**", "old": "stem/*"}) == {
        "head": {"bias": "new", "kernel": "new"},
        "stem": ["old", "old"],
    }
    with pytest.raises(tj.SelectionError) as error:
        tj.label(tree, {"new": "head/**", "biases": "**/bias"}, default="old")
    assert str(error.value) == (
        "'head/bias' is selected by both 'new' and 'biases'. Expected each leaf in one group: narrow one of the "
        "selectors, for example with & ~glob('head/bias')."
    )
    with pytest.raises(tj.SelectionError) as error:
        tj.label(tree, {"new": "head/**"})
    assert str(error.value) == (
        "2 of 4 leaves have no label: stem/0, stem/1. Add a selector for them or pass default='...'."
    )
    with pytest.raises(tj.SelectionError, match="selector 'neck' matched none of 4 parameters"):
        tj.label(tree, {"new": "neck"}, default="old")


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("head/[", r"glob 'head/\[' has a bracket that is not closed\. Write sets like '\[0-3\]', or regex\(\) for"),
        ("w[0", r"has a bracket that is not closed"),
        (
            "blocks/{10..}/x",
            r"glob 'blocks/\{10\.\.\}/x' has the incomplete range \{10\.\.\}\. Write two whole numbers",
        ),
        ("blocks/{..3}/x", r"has the incomplete range \{\.\.3\}\. Write two whole numbers, like '\{2\.\.5\}'\."),
        ("blocks/{a..c}", r"has the incomplete range \{a\.\.c\}"),
    ],
)
def test_what_is_not_closed_or_complete_raises(pattern, message):
    with pytest.raises(tj.SelectionError, match=message):
        tj.glob(pattern)
