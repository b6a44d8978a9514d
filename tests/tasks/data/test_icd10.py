import pytest
import simple_icd_10_cm as icd

from dynrank.errors import ConfigurationError
from dynrank.tasks.data.icd10 import icd10_terms


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


def test_no_term_stands_in_two_splits(splits):
    parts = [set(part.texts) for part in (splits.train, splits.val, splits.test)]
    assert sum(len(part) for part in parts) == len(set.union(*parts))
    assert all(len(part.texts) == len(set(part.texts)) for part in (splits.train, splits.val, splits.test))


def test_every_label_is_the_block_of_its_term(splits):
    truth = blocks_of_text()
    for part in (splits.train, splits.val, splits.test):
        for text, label in zip(part.texts, part.labels, strict=True):
            assert splits.blocks[label] in truth[text]


def test_evaluation_holds_inclusion_terms_only(splits):
    codes = [code for code in icd.get_all_codes() if not icd.is_chapter_or_block(code)]
    descriptions = {normal(icd.get_description(code)) for code in codes}
    assert not descriptions & {*splits.val.texts, *splits.test.texts}


def test_blocks_have_enough_training_terms(splits):
    counts = [splits.train.labels.count(label) for label in range(len(splits.blocks))]
    assert min(counts) >= 10
    assert set(splits.test.labels) <= set(range(len(splits.blocks)))


def test_split_sizes_are_about_7_to_1_to_2(splits):
    evaluated = len(splits.val.texts) + len(splits.test.texts)
    assert len(splits.test.texts) / evaluated == pytest.approx(2 / 3, abs=0.07)


def test_seed_changes_the_split_but_not_the_terms(splits):
    other = icd10_terms([1, 2, 9], code_length=4, min_terms=10, seed=1)
    assert set(other.test.texts) != set(splits.test.texts)
    assert icd10_terms([1, 2, 9], code_length=4, min_terms=10, seed=0) == splits


def test_longer_codes_add_training_terms_only(splits):
    longer = icd10_terms([1, 2, 9], code_length=7, min_terms=10, seed=0)
    assert len(longer.train.texts) > len(splits.train.texts)
    assert len(longer.test.texts) <= len(splits.test.texts) + len(longer.blocks)


def test_nothing_left_is_refused():
    with pytest.raises(ConfigurationError, match=r"task\.chapters"):
        icd10_terms([99], code_length=3, min_terms=10, seed=0)
