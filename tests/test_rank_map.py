"""Override files: PEFT's matching, its first match, and every fault named."""

import copy
import itertools
import re
from contextlib import suppress

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.rank_map import (
    RankRule,
    by_layer,
    first_matches,
    kind_of,
    load_rank_map,
    parse_rank_map,
    resolve_rank_map,
)

SHAPES = {
    "model.layers.0.q_proj": (8, 8),
    "model.layers.0.v_proj": (4, 8),
    "model.layers.1.q_proj": (8, 8),
    "model.layers.1.v_proj": (4, 8),
    "lm_head": (20, 8),
}


def resolve(rank_pattern, rank=2, alpha=4, shapes=SHAPES):
    return resolve_rank_map(shapes, parse_rank_map(rank_pattern, "test"), rank=rank, alpha=alpha)


def ranks(rank_pattern):
    return [layer.rank for layer in resolve(rank_pattern).values()]


PARTS = ["q", "q_proj", "eq", "0", "1", "10", "layers", "a"]
KEYS = [*PARTS, "0.q", r"layers\.0", "^q", "^layers.*", "q$", r"layers\.[01]\.q", ".*", "q|a", "(q|a)_proj", "q.*"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KEYS), st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join))
def test_matches_agrees_with_peft(key, name):
    # PEFT answers with the key that matches, or else with the name.
    theirs = get_pattern_key([key], name) == key
    assert (name in first_matches({key: 1}, [name])) is theirs


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_bert"])
def test_kind_attention_is_the_preset_of_target_modules_and_mlp_the_rest_of_the_blocks(family, request):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(request.getfixturevalue(family))
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = dynrank.add_lora(copy.deepcopy(model), rank=2, target_modules="attention")
    assert [name for name, _ in dynrank.lora_layers(chosen)] == [n for n in layers if kind_of(n) == "attention"]
    in_blocks = {name for name in layers if re.search(r"layers?\.\d", name)}
    assert {name for name in layers if kind_of(name) is not None} == in_blocks
    ranks = {"attention": 3, r"0\..*": 5, "mlp": {"rank": 4, "final_rank": 2}}
    dynrank.add_lora(model, rank=2, rank_map=ranks)
    for name, layer in dynrank.lora_layers(model):
        first = ".0." in name
        wanted = {"attention": (3, None), "mlp": (5, None) if first else (4, 2), None: (2, None)}[kind_of(name)]
        assert (layer.rank, layer.final_rank) == wanted, name


NAMES = [".".join(name) for name in itertools.product(["q", "layers"], ["0", "1"], ["attn", "mlp"], ["q", "up"])]
NAMES += ["q", "head"]


@given(st.lists(st.sampled_from([*NAMES, *KEYS, "attention", "mlp"]), unique=True), st.permutations(NAMES))
def test_a_layers_own_name_means_it_alone_and_before_all_patterns(keys, names):
    values = {key: number for number, key in enumerate(keys)}
    rules = {key: number for key, number in values.items() if key not in names}
    kinds = {"attention": [n for n in names if ".attn." in n], "mlp": [n for n in names if ".mlp." in n]}
    expected = {}
    for name in names:
        # PEFT answers with the key that matches, or else with the name.
        fitting = (key for key in rules if get_pattern_key([key], name) == key or name in kinds.get(key, ()))
        key = name if name in values else next(fitting, None)
        if key is not None:
            expected[name] = values[key]
    if {*values.values()} == {*expected.values()}:
        assert by_layer(values, names) == expected
        assert list(by_layer(values, names)) == list(expected)
    else:
        with pytest.raises(ConfigurationError, match="mean no layer") as caught:
            by_layer(values, names)
        assert all(repr(key) in str(caught.value) for key in values if values[key] not in expected.values())


@pytest.mark.parametrize(
    ("key", "said"), [(3, "3: a key must be text, got int"), ("(", "'\\(': not a regular expression")]
)
def test_a_key_that_is_no_pattern_is_refused(key, said):
    with pytest.raises(ConfigurationError, match=said):
        by_layer({key: 2}, NAMES)


def test_fields_of_a_rule_reach_its_layers_and_leave_the_rest():
    layers = resolve({"q_proj": {"rank": 6, "final_rank": 3, "alpha": 1.5, "highest": 5}, "lm_head": {"pinned": True}})
    ends = {"q_proj": (6, 1.5, 3, 5, False, "q_proj"), "v_proj": (2, 4, None, None, False, None)}
    for name, layer in layers.items():
        values = (layer.rank, layer.alpha, layer.final_rank, layer.highest, layer.pinned, layer.rule)
        assert values == ends.get(name.rpartition(".")[2], (2, 4, None, None, True, "lm_head"))


EXACT = "model.layers.0.q_proj"
PATTERN = "q_proj"
WIDE = ".*_proj"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({EXACT: 7, PATTERN: 3}, [7, 2, 3, 2, 2]),
        ({"1.v_proj": 4, WIDE: 3}, [3, 3, 3, 4, 2]),
        ({"1.q_proj": 5, EXACT: 6, WIDE: 4}, [6, 4, 5, 4, 2]),
    ],
)
def test_the_first_rule_that_matches_wins(rules, expected):
    assert ranks(rules) == expected


@pytest.mark.parametrize("equal", [True, False])
def test_a_rule_that_earlier_ones_hide_from_every_layer_is_refused(equal):
    with pytest.raises(ConfigurationError, match=rf"'{EXACT}' is hidden by '{PATTERN}'.*; move '{EXACT}' before"):
        resolve({PATTERN: 3, EXACT: 3 if equal else 7})
    with pytest.raises(ConfigurationError, match=r"'\.\*_proj' is hidden by 'q_proj' and 'v_proj'"):
        resolve({"q_proj": 3, "v_proj": 3, WIDE: 2})


def test_one_map_means_the_same_in_peft():
    pattern = {"1.q_proj": (6, 3), "q_proj": (5, 10), r"layers\.[01]\..*": (3, 9)}
    make = {name: torch.nn.Linear(8, 8) for name in ("q_proj", "v_proj")}
    plain = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.ModuleDict(copy.deepcopy(make)) for _ in "012"])}
    )
    plain.forward = lambda x: x
    ours = dynrank.add_lora(
        copy.deepcopy(plain),
        rank=2,
        alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_map={key: {"rank": rank, "alpha": alpha} for key, (rank, alpha) in pattern.items()},
    )
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={key: rank for key, (rank, _) in pattern.items()},
        alpha_pattern={key: alpha for key, (_, alpha) in pattern.items()},
    )
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(plain))
    expected = [5, 3, 6, 3, 5, 2]
    assert [layer.rank for _, layer in dynrank.lora_layers(ours)] == expected
    for name, layer in dynrank.lora_layers(ours):
        same = theirs.get_submodule(name)
        assert (layer.rank, layer.scaling) == (same.r["default"], same.scaling["default"]), name


@pytest.mark.parametrize(
    ("key", "near"), [("qproj", "q_proj"), (r"model\.layers\.0\.q_prj", EXACT), ("lm_haed", "lm_head")]
)
def test_resolve_key_that_matches_nothing_names_the_nearest(key, near):
    with pytest.raises(ConfigurationError, match=rf"{re.escape(repr(key))} matches no LoRA layer.*{re.escape(near)}"):
        resolve({key: 2})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"v_proj": 5}, r"v_proj': rank must be between 1 and min\(d_in, d_out\) = 4, got 5"),
        ({"q_proj": {"rank": 4, "final_rank": 5}}, "final_rank must be at most rank = 4, got 5"),
        # The rule gives no rank, so the default rank of 2 is the limit.
        ({"q_proj": {"final_rank": 3}}, "final_rank must be at most rank = 2, got 3"),
    ],
)
def test_resolve_refuses_ranks_that_do_not_fit(rule, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve(rule)
    with pytest.raises(ConfigurationError, match=r"v_proj': rank must be .* got 6; lower rank, or set"):
        resolve({}, rank=6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("8", "got '8'"),
        ({}, "got {}"),
        ({"rnak": 8}, "rnak is unknown; nearest: rank"),
        ({"alpha": float("inf")}, "alpha must .* got inf"),
        ({"pinned": True, "final_rank": 2}, "pinned layer has no final_rank"),
        ({"pinned": True, "highest": 2}, "pinned layer has .* no highest"),
    ],
)
def test_parse_rank_map_refuses_a_faulty_rule(value, message):
    with pytest.raises(ConfigurationError, match=rf"'q_proj': .*{message}"):
        parse_rank_map({"q_proj": value}, "test")


# global flags are an error anywhere but at the start, where PEFT's matching has its own text
@pytest.mark.parametrize("key", ["a)(b", 1, "(?i)Q_PROJ", "(" * 5000])
def test_parse_rank_map_refuses_a_key_that_is_no_pattern(key):
    with pytest.raises(ConfigurationError) as caught:
        parse_rank_map({key: 2}, "test")
    assert repr(key)[:20] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_faults_are_listed_all_at_once():
    with pytest.raises(ConfigurationError) as caught:
        parse_rank_map({"a": 0, "(": 2, "b": {"rnak": 1, "alpha": -1}}, "test")
    assert all(text in str(caught.value) for text in ("'a'", "'('", "rnak", "alpha must"))
    with pytest.raises(ConfigurationError) as caught:
        resolve({"qproj": 2, "v_proj": 5, "1.q_proj": 9, ".*head": 3, "lm_.*": 4})
    message = str(caught.value)
    for text in ("'qproj' matches", "layers.0.v_proj'", "layers.1.v_proj'", "got 9"):
        assert text in message
    assert "'lm_.*' is hidden by '.*head'" in message


def test_parse_rank_map_takes_rules():
    rule = RankRule(rank=3, alpha=2.0, pinned=True)
    assert parse_rank_map({"q": rule, "v": 4}, "test") == {"q": rule, "v": RankRule(rank=4)}


@pytest.fixture
def written(tmp_path):
    def write(text):
        file = tmp_path / "ranks.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


EXAMPLE = rb"""rank_pattern:
  lm_head: 16
  'layers\.[0-3]\..*q_proj': {rank: 32, final_rank: 8, alpha: 64}
  'layers\.11\..*': {rank: 8, pinned: true}
"""


def test_load_rank_map_reads_rules_and_follows_aliases_and_merge_keys(written):
    file = written(EXAMPLE)
    assert load_rank_map(file) == {
        "lm_head": RankRule(rank=16),
        r"layers\.[0-3]\..*q_proj": RankRule(rank=32, final_rank=8, alpha=64),
        r"layers\.11\..*": RankRule(rank=8, pinned=True),
    }
    assert load_rank_map(str(file)) == load_rank_map(file)
    file = written("rank_pattern: {q: &q {rank: 8, alpha: 4}, k: *q, v: {<<: *q, rank: 2}}")
    rule = RankRule(8, alpha=4.0)
    assert load_rank_map(file) == {"q": rule, "k": rule, "v": RankRule(2, alpha=4.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank_pattern: {q: 2\n", "must be YAML"),
        ("rank_pattern:\n  q: 2\n  v: 3\n  q: 4\n", "'q' is given twice"),
        ("rank_pattern: {q: !!python/object/apply:os.getcwd []}", "must be YAML"),
        ("rank_pattern: " + "[" * 5000, "must be YAML"),
        ("rank_pattern: &a [*a]", "one key rank_pattern"),
        ("rank_pattern: {q: 2}\nalpha: 3\n", "one key rank_pattern"),
        ("rank_pattern: {q: 0}", "'q': rank must be"),
        ("rank_pattern: {1: 2}", "key must be text"),
    ],
)
def test_load_rank_map_refuses_a_file_and_names_it(written, text, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_rank_map(written(text))
    assert "ranks.yaml" in str(caught.value)
    assert "rank_map" in str(caught.value)


PLACES = st.integers(0, len(EXAMPLE) - 1)
BYTES = st.integers(0, 255) | st.sampled_from(b"{}[]:'\"&*!|>%@ \n-#0")


# Python warns of a set in a regular expression that may change its meaning.
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(PLACES, BYTES, max_size=3), PLACES | st.none())
def test_load_rank_map_reads_a_damaged_file_or_refuses_it(written, damage, length):
    file = written(bytes(damage.get(place, byte) for place, byte in enumerate(EXAMPLE))[:length])
    with suppress(ConfigurationError):
        resolve_rank_map(SHAPES, load_rank_map(file), rank=2, alpha=4)


def test_load_rank_map_stays_small_and_fast_for_a_hostile_file(written):
    """Aliases of aliases stand for 10^20 values, and a thousand keys are no thousand squared comparisons."""
    bomb = ["&a0 [" + "x, " * 10 + "]"] + [f"&a{i} [" + f"*a{i - 1}, " * 10 + "]" for i in range(1, 20)]
    with pytest.raises(ConfigurationError) as caught:
        load_rank_map(written("rank_pattern:\n" + "".join(f"  k{i}: {rule}\n" for i, rule in enumerate(bomb))))
    assert len(str(caught.value)) < 10_000
    rules = load_rank_map(written("rank_pattern:\n" + "".join(f"  k{i}: 2\n" for i in range(3_000))))
    assert len(rules) == 3_000
    with pytest.raises(ConfigurationError) as caught:
        resolve_rank_map(SHAPES, rules, rank=2, alpha=4)
    assert len(str(caught.value)) < 10_000
