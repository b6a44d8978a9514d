"""Override files: PEFT's matching, its first match, and every fault named."""

import copy
import itertools
import re

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from transformers import AutoModel

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.patterns import by_layer
from dynrank.rank_map import (
    LayerValues,
    RankBounds,
    RankRule,
    load_rank_map,
    parse_rank_map,
    read_rank_map,
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


NAMES = [".".join(name) for name in itertools.product(["q", "layers"], ["0", "1"], ["attn", "mlp"], ["q", "up"])]
NAMES += ["q", "head", "layers.10.mlp.eq", "q_proj.10.attn.a"]
KEYS = ["q", "q_proj", "eq", "0", "1", "10", "layers", "a", "0.q", r"layers\.0", "^q", "^layers.*", "q$", ".*", "q.*"]
KEYS += [r"layers\.[01]\..*\.q", "q|a", "(q|up)", "mlp.*"]


@settings(max_examples=200, deadline=None)
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


def test_fields_of_a_rule_reach_its_layers_and_leave_the_rest():
    rules = {"q_proj": {"rank": 6, "final_rank": 3, "alpha": 1.5, "highest": 5}, "1.v_proj": 3, "mlp": {"pinned": True}}
    values = {
        "model.layers.0.q_proj": (6, 1.5, RankBounds(final_rank=3, highest=5), "q_proj"),
        "model.layers.0.v_proj": (2, 4, RankBounds(pinned=True), "mlp"),
        "model.layers.1.q_proj": (6, 1.5, RankBounds(final_rank=3, highest=5), "q_proj"),
        "model.layers.1.v_proj": (3, 6, RankBounds(), "1.v_proj"),
        "lm_head": (2, 4, RankBounds(), None),
    }
    assert resolve(rules) == {name: LayerValues(*expected) for name, expected in values.items()}


def test_one_map_means_the_same_in_peft(tiny_llama):
    pattern = {"1.self_attn.q_proj": (6, 3), "q_proj": (5, 10), r"layers\.[01]\..*v_proj": (3, 9)}
    targets = ["q_proj", "v_proj", "up_proj"]
    rules = {key: {"rank": rank, "alpha": alpha} for key, (rank, alpha) in pattern.items()}
    plain = AutoModel.from_pretrained(tiny_llama)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=targets,
        rank_pattern={key: rank for key, (rank, _) in pattern.items()},
        alpha_pattern={key: alpha for key, (_, alpha) in pattern.items()},
    )
    theirs = dict(dynrank.lora_layers(peft.inject_adapter_in_model(config, copy.deepcopy(plain))))
    ours = dict(dynrank.lora_layers(dynrank.add_lora(plain, rank=2, alpha=4, target_modules=targets, rank_map=rules)))
    found, expected = ({n: (la.rank, la.scaling) for n, la in layers.items()} for layers in (ours, theirs))
    assert found == expected
    assert {rank for rank, _ in found.values()} == {2, 3, 5, 6}


@pytest.mark.parametrize(
    ("key", "near"),
    [("qproj", "q_proj"), (r"model\.layers\.0\.q_prj", "model.layers.0.q_proj"), ("lm_haed", "lm_head")],
)
def test_resolve_key_that_matches_nothing_names_the_nearest(key, near):
    with pytest.raises(ConfigurationError, match=rf"{re.escape(repr(key))} matches no LoRA layer.*{re.escape(near)}"):
        resolve({key: 2})


def test_resolve_refuses_ranks_that_do_not_fit():
    message = r"v_proj': rank must be between 1 and min\(d_in, d_out\) = 4, got 5; fix the rule 'v_proj'"
    with pytest.raises(ConfigurationError, match=message):
        resolve({"v_proj": 5})
    with pytest.raises(ConfigurationError, match=r"v_proj': rank must be .* got 6; lower rank, or set"):
        resolve({}, rank=6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("8", "got '8'"),
        ({"rnak": 8}, "rnak is unknown; nearest: rank"),
        ({"pinned": True, "final_rank": 2}, "a pinned layer keeps its rank and has no final_rank; remove pinned, or f"),
        ({"pinned": True, "highest": 2, "lowest": 1}, "pinned layer .* no highest and no lowest; remove pinned, or h"),
        ({"lowest": 5, "highest": 4}, "lowest must be at most highest = 4, got 5"),
        ({"lowest": 5, "final_rank": 4}, "lowest must be at most final_rank = 4, got 5"),
        ({"final_rank": 5, "highest": 4}, "final_rank must be at most highest = 4, got 5"),
    ],
)
def test_parse_rank_map_refuses_a_faulty_rule(value, message):
    with pytest.raises(ConfigurationError, match=rf"'q_proj': .*{message}"):
        parse_rank_map({"q_proj": value}, "test")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            4,
            r"an int is the starting rank .* write \{final_rank: 4\}, the rank after the last stage, or \{highest: 4\}",
        ),
        (
            {"rank": 4},
            r"rank of a layer is set where LoRA is added: by rank_pattern of PEFT's LoraConfig, or by rank_map",
        ),
        ({"alpha": 4, "pinned": True}, "alpha of a layer is set .* by alpha_pattern of PEFT's LoraConfig"),
        (RankRule(rank=4, alpha=2), "rank and alpha of a layer are set .* by rank_pattern and alpha_pattern of PEFT's"),
        ({}, "must be a mapping of pinned, highest, lowest, final_rank, got {}"),
        (True, "must be a mapping of pinned, highest, lowest, final_rank, got True"),
        ({"higest": 4}, "higest is unknown; nearest: highest"),
        ({"target_r": 4}, "target_r is final_rank here"),
        ({"pinned": 1}, "pinned must be a valid boolean, got 1"),
        ({"highest": 0}, "highest must be greater than or equal to 1, got 0"),
    ],
)
def test_a_schedules_map_refuses_what_add_lora_sets_and_what_is_no_bound(value, message):
    with pytest.raises(ConfigurationError, match=f"'q_proj': {message}"):
        read_rank_map({"q_proj": value}, RankBounds)


def test_a_schedules_map_is_a_file_a_mapping_or_absent(tmp_path):
    bounds = {"attention": RankBounds(lowest=4, highest=8), "mlp": RankBounds(pinned=True)}
    file = written(tmp_path, "rank_pattern:\n  attention: {lowest: 4, highest: 8}\n  mlp: {pinned: true}\n")
    assert read_rank_map(file, RankBounds) == read_rank_map(str(file), RankBounds) == bounds
    assert read_rank_map(bounds, RankBounds) == bounds
    assert read_rank_map(None, RankBounds) == {}
    # A rule of add_lora without a start is one of a schedule, and the other way round.
    assert read_rank_map({"mlp": RankRule(pinned=True)}, RankBounds) == {"mlp": RankBounds(pinned=True)}
    assert read_rank_map(bounds, RankRule)["mlp"] == RankRule(pinned=True)
    with pytest.raises(ConfigurationError, match=r"'mlp': rank of a layer"):
        read_rank_map(written(tmp_path, "rank_pattern: {mlp: {rank: 4}}"), RankBounds)
    with pytest.raises(ConfigurationError, match=r"rank_map must be the path of a file or a mapping .*, got \['mlp'\]"):
        read_rank_map(["mlp"], RankBounds)


# global flags are an error anywhere but at the start, where PEFT's matching has its own text
@pytest.mark.parametrize("key", ["a)(b", 1, "(?i)Q_PROJ", "(" * 5000])
@pytest.mark.parametrize("check", [lambda rules: parse_rank_map(rules, "test"), lambda rules: by_layer(rules, NAMES)])
def test_a_key_that_is_no_pattern_is_refused(key, check):
    with pytest.raises(ConfigurationError) as caught:
        check({key: 2})
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
    assert "'lm_.*' is hidden by '.*head': the first pattern that matches a layer wins; move 'lm_.*' before" in message


def written(folder, text):
    file = folder / "ranks.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


EXAMPLE = rb"""rank_pattern:
  lm_head: 16
  'layers\.[0-3]\..*q_proj': {rank: 32, final_rank: 8, alpha: 64}
  'layers\.11\..*': {rank: 8, pinned: true}
"""


def test_load_rank_map_reads_rules_and_follows_aliases_and_merge_keys(tmp_path):
    file = written(tmp_path, EXAMPLE)
    assert load_rank_map(file) == {
        "lm_head": RankRule(rank=16),
        r"layers\.[0-3]\..*q_proj": RankRule(rank=32, final_rank=8, alpha=64),
        r"layers\.11\..*": RankRule(rank=8, pinned=True),
    }
    assert parse_rank_map(load_rank_map(str(file)), "rules themselves") == load_rank_map(file)
    file = written(tmp_path, "rank_pattern: {q: &q {rank: 8, alpha: 4}, k: *q, v: {<<: *q, rank: 2}}")
    rule = RankRule(rank=8, alpha=4.0)
    assert load_rank_map(file) == {"q": rule, "k": rule, "v": RankRule(rank=2, alpha=4.0)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank_pattern: {q: 2\n", "cannot be read as YAML"),
        ("rank_pattern:\n  q: 2\n  v: 3\n  q: 4\n", "duplicate key q"),
        ("rank_pattern: {q: !!python/object/apply:os.getcwd []}", "cannot be read as YAML"),
        ("rank_pattern: " + "[" * 900, "cannot be read as YAML"),
        ("rank_pattern: {q: 2023-13-45}", "'q': must be an int"),
        (b"\xff", "cannot be read as YAML"),
        ("rank_pattern: {q: '${'}", "cannot be read as YAML"),
        ("rank_pattern: {q: 2}\nalpha: 3\n", "one key rank_pattern"),
        ("rank_pattern: {q: 0}", "'q': rank must be"),
    ],
)
def test_load_rank_map_refuses_a_file_and_names_it(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_rank_map(written(tmp_path, text))
    assert "ranks.yaml" in str(caught.value)
    assert "rank_map" in str(caught.value)


def test_what_is_said_of_a_hostile_file_stays_small(tmp_path):
    """Aliases of aliases stand for thousands of values, and thousands of keys are as many faults."""
    bomb = ["&a0 [" + "x, " * 10 + "]"] + [f"&a{i} [" + f"*a{i - 1}, " * 10 + "]" for i in range(1, 4)]
    file = written(tmp_path, "rank_pattern:\n" + "".join(f"  k{i}: {rule}\n" for i, rule in enumerate(bomb)))
    for refused in (lambda: load_rank_map(file), lambda: resolve({f"k{i}": 2 for i in range(3_000)})):
        with pytest.raises(ConfigurationError) as caught:
            refused()
        assert len(str(caught.value)) < 10_000
