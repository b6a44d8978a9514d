"""Terms of ICD-10-CM with their blocks of codes; no term is in two splits."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dynrank.app.tasks.data.splits import Rows, place
from dynrank.errors import ConfigurationError, checked_call

# Chapters of injuries and of external causes. Half of all codes are theirs, made from templates ("... initial
# encounter"), so only their categories are used.
_TEMPLATED = ("19", "20")


@checked_call
def icd10_terms(
    chapters: Sequence[Annotated[int, Field(ge=1, le=22)]] | None,
    min_terms: Annotated[int, Field(ge=1)],
    seed: int,
) -> Rows:
    """Terms and their blocks (code ranges such as ``A00-A09``) by split.

    Inclusion terms are the words that clinicians use for a code. The descriptions of all categories (``A00``) and 70%
    of the inclusion terms are for training, 10% of these terms for validation and 20% for the test. Texts are compared
    case-folded with single spaces. A text in two blocks is left out, and a description is never also an inclusion term.
    The split of an inclusion term depends only on (``seed``, text).

    Args:
        chapters: ICD-10-CM chapters to use, 1 to 22; None for all.
        min_terms: blocks with fewer training texts are left out.
        seed: seed of the splits.
    """
    described, included = _terms(chapters)
    blocks: dict[str, set[str]] = defaultdict(set)
    for text, block in [*described, *included]:
        blocks[text].add(block)
    descriptions = {text for text, _ in described}
    rows: Rows = {"train": [], "val": [], "test": []}
    for text in sorted(blocks):
        if len(blocks[text]) == 1:
            split = "train" if text in descriptions else place(text, seed, 0.7, 0.8)
            rows[split].append({"text": text, "label": min(blocks[text])})
    sizes = Counter(row["label"] for row in rows["train"])
    rows = {split: [row for row in part if sizes[row["label"]] >= min_terms] for split, part in rows.items()}
    if not all(rows.values()):
        raise ConfigurationError("no ICD-10-CM terms are left; set data.chapters or data.min_terms")
    return rows


def _terms(chapters: Sequence[int] | None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(description, block) of categories, and (inclusion term, block) of codes."""
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise ConfigurationError(
            "data=icd10 needs the package simple-icd-10-cm; pip install 'dynrank[medical]'"
        ) from None
    described: list[tuple[str, str]] = []
    included: list[tuple[str, str]] = []
    for chapter in map(str, range(1, 23) if chapters is None else chapters):
        for code in icd.get_descendants(chapter):
            block = next((c for c in [code, *icd.get_ancestors(code)] if icd.is_block(c)), None)
            # 'C7A' is a block and a category.
            if block is None or (icd.is_block(code) and not icd.is_category(code)):
                continue
            if icd.is_category(code):
                described.append((_normal(icd.get_description(code)), block))
            if icd.is_category(code) or chapter not in _TEMPLATED:
                included += [(_normal(term), block) for term in icd.get_inclusion_term(code)]
    return described, included


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
