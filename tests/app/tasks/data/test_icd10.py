from collections import Counter

import pytest
import simple_icd_10_cm as icd

from dynrank.app.tasks.data.icd10 import icd10_terms
from dynrank.errors import ConfigurationError


@pytest.fixture(scope="module")
def splits():
    return icd10_terms([1, 2, 9], code_length=4, min_terms=10, seed=0)


def normal(text):
    return " ".join(text.casefold().split())


def blocks_of_text():
    """Every block under which a text stands in chapters 1, 2 and 9, straight from the classification."""
    found = {}
    for code in icd.get_all_codes():
        ancestors = icd.get_ancestors(code)
        if ancestors and ancestors[-1] in ("1", "2", "9"):
            block = next((c for c in [code, *ancestors] if icd.is_block(c)), None)
            for text in [icd.get_description(code), *icd.get_inclusion_term(code)]:
                found.setdefault(normal(text), set()).add(block)
    return found


def texts(splits, *names):
    return [row["text"] for name in names or splits for row in splits[name]]


def test_a_term_stands_once_with_the_block_of_its_codes(splits):
    truth = blocks_of_text()
    assert len(texts(splits)) == len(set(texts(splits)))
    assert all(row["label"] in truth[row["text"]] for part in splits.values() for row in part)


def test_evaluation_holds_inclusion_terms_only(splits):
    codes = [code for code in icd.get_all_codes() if not icd.is_chapter_or_block(code)]
    descriptions = {normal(icd.get_description(code)) for code in codes}
    assert not descriptions & {*texts(splits, "val", "test")}


def test_blocks_have_enough_training_terms(splits):
    sizes = Counter(row["label"] for row in splits["train"])
    assert min(sizes.values()) >= 10
    assert {row["label"] for part in splits.values() for row in part} == sizes.keys()


def test_the_seed_decides_the_split(splits):
    assert icd10_terms([1, 2, 9], code_length=4, min_terms=10, seed=0) == splits
    assert icd10_terms([1, 2, 9], code_length=4, min_terms=10, seed=1)["test"] != splits["test"]


def test_what_leaves_no_terms_is_named():
    with pytest.raises(ConfigurationError, match=r"no ICD-10-CM terms are left; set data\.chapters"):
        icd10_terms([1], code_length=3, min_terms=10_000, seed=0)
