"""The labels of checked rows: how many rows have each, where rows of one text differ, a fair share of each class."""

import hashlib
from typing import Any

import datasets
import pandas


def number_of(key: str, seed: int) -> int:
    """A random whole number below 2**64 that depends only on (``seed``, ``key``)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8])


def label_pairs(rows: datasets.Dataset) -> pandas.DataFrame:
    """Each pair of a ``row`` and one of its labels, which is missing for a row without labels; in the order of rows."""
    names = [name for name in ("digest", "label") if name in rows.column_names]
    frame: pandas.DataFrame = rows.select_columns(names).to_pandas()
    return frame.rename_axis("row").reset_index().explode("label", ignore_index=True)


def counted(rows: datasets.Dataset) -> dict[str, int]:
    """{label: number of its rows}, the most frequent first."""
    counts = label_pairs(rows)["label"].value_counts().to_dict()
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def ambiguous_texts(rows: datasets.Dataset) -> dict[str, int]:
    """{label: number of the texts that have it in some of their rows, and not in others}; 0 is left out."""
    pairs = label_pairs(rows)
    all_rows = pairs.groupby("digest")["row"].nunique()
    with_label = pairs.groupby(["digest", "label"])["row"].nunique()
    texts = with_label.index.get_level_values("digest")
    found: dict[str, int] = (
        with_label[with_label.to_numpy() < all_rows[texts].to_numpy()].groupby("label").size().to_dict()
    )
    return found


def within_classes(rows: datasets.Dataset, numbers: Any, seed: int) -> Any:
    """(rows,) numbers from 0 to below 1, alike in each class: a share of them is the same share of each class.

    Rows of the same text have the same number, and count once, in the class of the first; a row with several labels
    counts in the rarest. No share of the highest numbers has all texts of a class, nor all texts of a label.

    Args:
        rows: rows with the digests of their texts.
        numbers: (rows,) random numbers of the texts.
        seed: seed of the places where the shares begin; without these, small classes would all lack the same splits.
    """
    pairs = label_pairs(rows)
    pairs["count"] = pairs["label"].map(counted(rows))
    texts = pairs.sort_values(["row", "count", "label"]).drop_duplicates("digest")
    texts = texts.assign(label=texts["label"].fillna(""), number=numbers[texts["row"]]).sort_values("number")
    places = texts.groupby("label").cumcount()
    offsets = texts["label"].map({label: number_of(label, seed) / 2**64 for label in texts["label"].unique()})
    shares = (places + offsets) / texts.groupby("label")["row"].transform("size")
    found = shares.where(places > 0, 0.0).set_axis(texts["digest"])
    pairs["number"] = pairs["digest"].map(with_each_label(found, pairs))
    return pairs.drop_duplicates("row")["number"].to_numpy()


def with_each_label(numbers: Any, pairs: pandas.DataFrame) -> Any:
    """``numbers`` of texts by digest, with a text of each label at 0.

    A label may have no text of its own: rows of the same text count in the class of the first, and a row with several
    labels in one of their classes. Then its text with the lowest number is moved to 0.
    """
    of_labels = pairs.dropna(subset="label").assign(number=lambda frame: frame["digest"].map(numbers))
    lowest = of_labels.sort_values(["label", "number", "digest"]).drop_duplicates("label")["digest"]
    return numbers.where(~numbers.index.isin(lowest), 0.0)
