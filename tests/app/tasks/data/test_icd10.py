from collections import Counter

import pytest
import simple_icd_10_cm as icd

from dynrank.app.tasks.data.icd10 import icd10_terms
from dynrank.errors import ConfigurationError


@pytest.fixture(scope="module")
def splits():
    return icd10_terms([1, 2, 9], min_terms=10, seed=0)


def normal(text):
    return " ".join(text.casefold().split())


def test_terms_stand_once_with_their_block_and_only_inclusion_terms_evaluate(splits):
    blocks, descriptions = {}, set()
    for code in icd.get_all_codes():
        description = normal(icd.get_description(code))
        if not icd.is_chapter_or_block(code):
            descriptions.add(description)
        block = next((c for c in [code, *icd.get_ancestors(code)] if icd.is_block(c)), None)
        for text in [description, *map(normal, icd.get_inclusion_term(code))]:
            blocks.setdefault(text, set()).add(block)
    rows = [row for part in splits.values() for row in part]
    assert all(row["label"] in blocks[row["text"]] for row in rows)
    assert len(rows) == len({row["text"] for row in rows})
    assert not descriptions & {row["text"] for split in ("val", "test") for row in splits[split]}
    sizes = Counter(row["label"] for row in splits["train"])
    assert min(sizes.values()) >= 10
    assert {row["label"] for row in rows} == sizes.keys()


def test_the_seed_decides_the_split(splits):
    assert icd10_terms([1, 2, 9], min_terms=10, seed=0) == splits
    assert icd10_terms([1, 2, 9], min_terms=10, seed=1)["test"] != splits["test"]


def test_what_leaves_no_terms_is_named():
    with pytest.raises(ConfigurationError, match=r"no ICD-10-CM terms are left; set data\.chapters"):
        icd10_terms([1], min_terms=10_000, seed=0)
