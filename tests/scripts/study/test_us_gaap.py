import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from study_data import us_gaap
from study_data.us_gaap import line_items

from dynrank.errors import ConfigurationError

pytestmark = pytest.mark.skipif(find_spec("edgar") is None, reason="needs edgartools (pip install --no-deps)")


@pytest.fixture(scope="module")
def splits():
    return line_items(seed=0)


def letters(text):
    return re.sub("[^a-z]", "", text.lower())


def items(*parts):
    """(text, section) of prompts and answers."""
    # Tokens of words begin with a space.
    form = r"Line item: (.+)\nSection:\| (.+)"
    found = [re.fullmatch(form, "|".join(row.values())) for part in parts for row in part]
    return [match.groups() for match in found]


def test_no_text_stands_twice_whatever_its_spaces_case_and_digits(splits):
    keys = [letters(text) for text, _ in items(*splits.values())]
    assert len(keys) == len(set(keys)) > 2000


def test_every_section_is_the_only_one_that_the_package_gives_its_item(splits):
    folder = Path(find_spec("edgar").submodule_search_locations[0])
    entries = json.loads((folder / us_gaap._FILE).read_text(encoding="utf-8"))
    found = {}
    for tag, entry in entries.items():
        if tag.isalnum() and len(entry["standard_tags"]) == 1:
            section = entry.get("section") or entry["display_name"].removeprefix("Net Cash from ")
            found.setdefault(letters(tag), set()).add(section)
    assert all(found[letters(text)] == {section} for text, section in items(*splits.values()))


def test_each_section_is_shared_out_alike(splits):
    counts = {split: Counter(section for _, section in items(part)) for split, part in splits.items()}
    assert counts["train"].keys() == counts["val"].keys() == counts["test"].keys()
    for section in counts["train"]:
        whole = sum(count[section] for count in counts.values())
        assert whole >= 50
        assert counts["test"][section] / whole == pytest.approx(0.2, abs=0.01)
        assert counts["val"][section] / whole == pytest.approx(0.1, abs=0.01)
    assert sum(counts["test"].values()) > 400


def test_splits_depend_on_the_seed_alone(splits):
    assert line_items(seed=0) == splits
    assert {*items(line_items(seed=1)["test"])} != {*items(splits["test"])}


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(us_gaap, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="needs the package edgartools: pip install"):
        line_items(seed=0)


@pytest.mark.parametrize("text", ["not JSON", '{"Assets": {"section": "Totals"}}'])
def test_another_form_of_the_data_is_refused(text, monkeypatch, tmp_path):
    file = tmp_path / "gaap_mappings.json"
    file.write_text(text)
    monkeypatch.setattr(us_gaap, "_FILE", file)
    with pytest.raises(ConfigurationError, match=r"pip install --no-deps edgartools==5\.62\.1"):
        line_items(seed=0)
