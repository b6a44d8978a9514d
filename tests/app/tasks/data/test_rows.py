"""Columns of users' rows, what is made of the rows, and what is wrong with some."""

import pytest
from datasets import ClassLabel

from dynrank.app.tasks.data.columns import COLUMNS, find_columns
from dynrank.app.tasks.data.rows import checked_row
from dynrank.errors import ConfigurationError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
TEXT = {"text": "x", "label": "a"}
# Each has a form, a row, and what is read of it, or what is wrong with it.
ROWS = {
    "TRL's completion": ("completion", {"prompt": "x", "completion": "y"}, {"prompt": "x", "answer": "y"}),
    "a system prompt": ("chat", {"messages": [SYSTEM, *TURNS]}, {"messages": [SYSTEM, *TURNS]}),
    "an int as a label": ("classification", {"text": "x", "label": 3}, {"text": "x", "label": "3"}),
    "another name": ("classification", {"text": "x", "labels": "b"}, {"text": "x", "label": "b"}),
    "several labels": ("classification", {"text": "x", "label": ["b", "a"]}, "not blank, got ['b', 'a']"),
    "a broken number": ("classification", {"text": "x", "label": 0.5}, "not blank, got 0.5"),
    "no label": ("classification", {"text": "x", "label": None}, "label must be a text that is not blank, got None"),
    "an empty answer": ("completion", {"prompt": "x", "answer": " "}, "answer must be a text that is not blank"),
    "chats as a prompt": ("completion", {"prompt": TURNS, "answer": "y"}, "prompt must be a text that is not"),
    "the assistant first": ("chat", {"messages": TURNS[1:]}, "the chat must start with the user, got ['assistant']"),
    "nobody answers": ("chat", {"messages": TURNS[:1]}, "no turn of the assistant"),
    "no messages": ("chat", {"messages": []}, "must start with the user, got []"),
    "tool calls": ("chat", {"messages": [TURNS[0], CALL]}, "message of the assistant must be"),
    "ShareGPT's keys": ("chat", {"messages": [{"from": "human", "value": "q"}]}, "must have a role and a content, got"),
    "a silent user": ("chat", {"messages": [{**TURNS[0], "content": ""}]}, "message of the user must be a text"),
}  # fmt: skip


def read(row, form, kind=None, **options):
    """The one row, whose index is 5, in a file whose first row is 2."""
    names = find_columns([*row], {}, form, "data.train", **options)
    return checked_row(row, 5, names=names, first=2, label=kind, asked=bool(options))


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_read_or_its_fault_is_named(case):
    form, row, expected = ROWS[case]
    found = read(row, form)
    assert found["place"] == 7
    if isinstance(expected, str):
        assert expected in found["fault"]
    else:
        assert found["fault"] is None
        assert {name: found[name] for name in COLUMNS[form]} == expected


def test_a_question_needs_no_answer_and_ends_before_one():
    assert read({"messages": TURNS}, "chat", asked=True)["messages"] == TURNS[:1]
    assert read({"text": "x"}, "classification", asked=True)["text"] == "x"


def test_classes_of_datasets_are_names_and_minus_one_is_none():
    kind = ClassLabel(names=["y", "x"])
    found = [read({"text": "t", "label": i}, "classification", kind) for i in (0, 1, -1)]
    assert [row["label"] for row in found] == ["y", "x", None]
    assert found[2]["fault"] == "label must be a text that is not blank, got None"


# Each has a form, the columns there are, and names of columns.
WRONG = {
    "no column 'txt'; it has .*; set data.columns.text=text": ("classification", TEXT, {"text": "txt"}),
    "no column 'body'; it has .*; set data.columns.text=NAME": ("classification", TEXT, {"text": ["body", "text"]}),
    r"must name one of \['text', 'label'\] for the form classification, got \['answer'\]": (
        "classification",
        TEXT,
        {"answer": "label", "prompt": None},
    ),
    "data.columns.label must be one column, got": ("classification", TEXT, {"label": ["text", "label"]}),
    r"no column 'prompt'; it has \['text', 'label'\]; set data.columns.prompt=NAME": ("completion", TEXT, {}),
}


@pytest.mark.parametrize("said", WRONG)
def test_columns_that_do_not_fit_are_named(said):
    form, columns, given = WRONG[said]
    with pytest.raises(ConfigurationError, match=said):
        find_columns([*columns], given, form, "data.train")


def test_names_of_training_hold_and_answers_need_no_column():
    given = {"text": ["Subject", "Body"]}
    found = find_columns(["Subject", "Body"], given, "classification", "FILE", asked=True)
    assert found == {"text": ("Subject", "Body")}
    with pytest.raises(ConfigurationError, match=r"no column 'Subject'.*; rename one"):
        find_columns(["text"], given, "classification", "FILE", asked=True)
