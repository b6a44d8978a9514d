"""A user's own task, as short as it can be, trained and exported by a whole run."""

import json

import pytest

import dynrank
from dynrank.run import job

REVIEWS = '''
from dynrank.tasks.classification import Classification

ROWS = [(f"{word} film number {i}", label) for i in range(30) for word, label in (("fine", "good"), ("dull", "bad"))]


def splits():
    return {"train": ROWS[:40], "val": ROWS[40:50], "test": ROWS[50:]}


class Reviews(Classification):
    """Is a review good or bad?"""

    def __init__(self, **settings):
        super().__init__(**settings | {"data": splits()})
'''
WAYS = {
    "a class": ["task=classification", "task._target_=reviews.Reviews"],
    "a function": ["task=classification", "task.data={_target_: reviews.splits}"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")  # Lightning's advice about small data
def test_own_texts_are_trained_on(way, tiny_bert, tmp_path, monkeypatch):
    (tmp_path / "reviews.py").write_text(REVIEWS)
    monkeypatch.syspath_prepend(tmp_path)
    options = [
        "debug=smoke",
        f"task.model={tiny_bert}",
        "optimizer.lr=0.003",
        "optimizer.head_lr=0.003",
        "plots=false",
        "schedule.shared=false",
    ]
    job.run(dynrank.compose([*WAYS[way], *options, "task.limit=null", "trainer.max_steps=100"]), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"]["test/accuracy"] == 1
    assert set(summary["final_ranks"].values()) == {16}
