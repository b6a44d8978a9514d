"""Terms of ICD-10-CM with the block of codes that each belongs to, split so that no term stands in two splits."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dynrank.errors import ConfigurationError

# Injuries (19) and external causes (20) are templates ("... initial encounter") and half of all codes: categories only.
_TEMPLATED = ("19", "20")


@dataclass(frozen=True)
class Terms:
    """One split: ``texts[i]`` belongs to the block with index ``labels[i]``."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class TermSplits:
    """The three splits and ``blocks``, the names (code ranges such as ``A00-A09``) of the labels."""

    train: Terms
    val: Terms
    test: Terms
    blocks: tuple[str, ...]


def icd10_terms(chapters: Sequence[int] | None, code_length: int, min_terms: int, seed: int) -> TermSplits:
    """Official descriptions and 70% of the inclusion terms for training, 10% of these for validation, 20% for the test.

    Inclusion terms are the words clinicians use for a code. A text is compared case-folded with single blanks; one that
    stands under two blocks is left out, one that is a description is never an inclusion term. Which split an inclusion
    term falls into depends on (``seed``, text) alone.

    Args:
        chapters: ICD-10-CM chapters to use, 1 to 22; None for all.
        code_length: longest code whose description is used, in characters without the dot: 3 to 7.
        min_terms: blocks with fewer training texts are left out.
        seed: of the split.

    Raises:
        ConfigurationError: if the package ``simple-icd-10-cm`` is missing or nothing is left.
    """
    if code_length not in range(3, 8):
        raise ConfigurationError(f"task.code_length must be an int from 3 to 7, got {code_length!r}")
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise ConfigurationError(
            "task=medical_terms needs the package simple-icd-10-cm; pip install 'dynrank[medical]'"
        ) from None
    wanted = {str(chapter) for chapter in chapters} if chapters is not None else None
    described: list[tuple[str, str]] = []
    included: list[tuple[str, str]] = []
    for code in icd.get_all_codes():
        ancestors = icd.get_ancestors(code)
        block = next((c for c in [code, *ancestors] if icd.is_block(c)), None)
        if block is None or (icd.is_block(code) and not icd.is_category(code)):  # 'C7A' is a block and a category
            continue
        if (wanted is not None and ancestors[-1] not in wanted) or (
            ancestors[-1] in _TEMPLATED and not icd.is_category(code)
        ):
            continue
        if len(code.replace(".", "")) <= code_length:
            described.append((_normal(icd.get_description(code)), block))
        included += [(_normal(term), block) for term in icd.get_inclusion_term(code)]
    return _split(described, included, min_terms, seed)


def _split(
    described: Sequence[tuple[str, str]], included: Sequence[tuple[str, str]], min_terms: int, seed: int
) -> TermSplits:
    blocks_of: dict[str, set[str]] = defaultdict(set)
    descriptions = {text for text, _ in described}
    for text, block in [*described, *included]:
        blocks_of[text].add(block)
    places: dict[str, list[tuple[str, str]]] = {"train": [], "val": [], "test": []}
    for text in sorted(blocks_of):
        if len(blocks_of[text]) == 1:
            split = "train" if text in descriptions else _place(text, seed)
            places[split].append((text, min(blocks_of[text])))
    sizes = Counter(block for _, block in places["train"])
    blocks = sorted(block for block, count in sizes.items() if count >= min_terms)
    if not blocks or not all(any(b in blocks for _, b in pairs) for pairs in places.values()):
        raise ConfigurationError("no ICD-10-CM terms are left; set task.chapters, task.code_length or task.min_terms")
    index = {block: i for i, block in enumerate(blocks)}
    kept = {name: [(text, index[block]) for text, block in pairs if block in index] for name, pairs in places.items()}
    splits = {name: Terms(*map(tuple, zip(*pairs, strict=True))) for name, pairs in kept.items()}
    return TermSplits(splits["train"], splits["val"], splits["test"], tuple(blocks))


def _place(text: str, seed: int) -> str:
    share = int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8]) / 2**64
    return "train" if share < 0.7 else "val" if share < 0.8 else "test"


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
