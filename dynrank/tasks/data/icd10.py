"""Terms of ICD-10-CM with the block of codes that each belongs to, split so that no term stands in two splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from dynrank.errors import ConfigurationError, validated_call
from dynrank.tasks.data.splits import Pairs, place

# Injuries (19) and external causes (20) are templates ("... initial encounter") and half of all codes: categories only.
_TEMPLATED = ("19", "20")


@validated_call("data")
def icd10_terms(
    chapters: Sequence[Annotated[int, Field(ge=1, le=22)]] | None,
    code_length: Annotated[int, Field(ge=3, le=7)],
    min_terms: Annotated[int, Field(ge=1)],
    seed: int,
) -> Pairs:
    """Terms and their blocks (code ranges such as ``A00-A09``) by split.

    Official descriptions and 70% of the inclusion terms are for training, 10% of these for validation, 20% for the
    test. Inclusion terms are the words clinicians use for a code. A text is compared case-folded with single blanks;
    one that stands under two blocks is left out, one that is a description is never an inclusion term. Which split an
    inclusion term falls into depends on (``seed``, text) alone.

    Args:
        chapters: ICD-10-CM chapters to use, 1 to 22; None for all.
        code_length: longest code whose description is used, in characters without the dot.
        min_terms: blocks with fewer training texts are left out.
        seed: of the split.
    """
    described, included = _terms(chapters, code_length)
    blocks: dict[str, set[str]] = defaultdict(set)
    for text, block in [*described, *included]:
        blocks[text].add(block)
    descriptions = {text for text, _ in described}
    pairs: Pairs = {"train": [], "val": [], "test": []}
    for text in sorted(blocks):
        if len(blocks[text]) == 1:
            split = "train" if text in descriptions else place(text, seed, 0.7, 0.8)
            pairs[split].append((text, min(blocks[text])))
    sizes = Counter(block for _, block in pairs["train"])
    pairs = {split: [pair for pair in rows if sizes[pair[1]] >= min_terms] for split, rows in pairs.items()}
    if not all(pairs.values()):
        raise ConfigurationError("no ICD-10-CM terms are left; set data.chapters, data.code_length or data.min_terms")
    return pairs


def _terms(chapters: Sequence[int] | None, code_length: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(description, block) of codes, and (inclusion term, block)."""
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
            if icd.is_category(code) or chapter not in _TEMPLATED:
                if len(code.replace(".", "")) <= code_length:
                    described.append((_normal(icd.get_description(code)), block))
                included += [(_normal(term), block) for term in icd.get_inclusion_term(code)]
    return described, included


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
