"""Columns of users' rows, what is made of the rows, and what is wrong with some."""

import pytest

from dynrank.app.tasks.data.columns import COLUMNS, find_columns, form_of
from dynrank.app.tasks.data.rows import checked_rows
from dynrank.errors import ConfigurationError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
# Each has a form, a row, and what is read of it, or what is wrong with it.
ROWS = {
    "Alpaca": ("completion", {"instruction": "add", "input": "1 2", "output": "3"},
               {"prompt": "add\n1 2", "answer": "3"}),
    "Alpaca without an input": ("completion", {"instruction": "add", "input": "", "output": "3"},
                                {"prompt": "add", "answer": "3"}),
    "LLaMA-Factory": ("completion", {"prompt": "add", "query": "1 2", "response": "3"},
                      {"prompt": "add\n1 2", "answer": "3"}),
    "axolotl's context_qa": ("completion", {"context": "1 2", "question": "add", "answer": "3"},
                             {"prompt": "add\n1 2", "answer": "3"}),
    "axolotl's metharme": ("completion", {"prompt": "add", "generation": "3"}, {"prompt": "add", "answer": "3"}),
    "ShareGPT": ("chat", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                          "system": "s"}, {"messages": [SYSTEM, *TURNS]}),
    "axolotl's open_orca": ("chat", {"system_prompt": "s", "question": "q", "response": "a"},
                            {"messages": [SYSTEM, *TURNS]}),
    "two system prompts": ("chat", {"messages": [SYSTEM, *TURNS], "system": "s"}, {"messages": [SYSTEM, *TURNS]}),
    "another system prompt": ("chat", {"messages": [SYSTEM, *TURNS], "system": "t"}, {"messages": [SYSTEM, *TURNS]}),
    "an input alone": ("completion", {"input": "q", "output": "a"}, {"prompt": "q", "answer": "a"}),
    "a query alone": ("chat", {"query": "q", "response": "a"}, {"messages": TURNS}),
    "TRL's chat with a context": ("chat", {"prompt": TURNS[:1], "completion": TURNS[1:], "context": "c"},
                                  {"messages": [{**TURNS[0], "content": "q\nc"}, TURNS[1]]}),
    "a context that is no text": ("chat", {"prompt": TURNS[:1], "completion": TURNS[1:], "context": [1]},
                                  "must have a text as its input"),
    "TRL's chat": ("chat", {"prompt": TURNS[:1], "completion": TURNS[1:]}, {"messages": TURNS}),
    "an empty answer": ("completion", {"prompt": "x", "answer": " "}, "has an empty answer"),
    "the assistant first": ("chat", {"messages": TURNS[1:]}, "starts with the assistant"),
    "nobody answers": ("chat", {"messages": TURNS[:1]}, "without a turn of the assistant"),
    "tool calls": ("chat", {"messages": [TURNS[0], CALL]}, "has tool calls"),
    "ShareGPT's tool calls": ("chat", {"conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "a"}]}, "has tool calls"),
    "a silent user": ("chat", {"messages": [{**TURNS[0], "content": ""}]}, "of the user that has an empty content"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_what_others_write_is_read_or_named(case):
    form, row, expected = ROWS[case]
    columns = find_columns([row], {}, form, "data.train")
    made = checked_rows({name: [cell] for name, cell in row.items()}, [5], columns=columns, first=2, classes=None)
    found = {name: cell for name, (cell,) in made.items()}
    assert found["place"] == 7
    if isinstance(expected, str):
        assert expected in found["fault"]
    else:
        assert found["fault"] is None
        assert {name: found[name] for name in COLUMNS[form]} == expected


def test_turns_as_a_prompt_are_a_chat():
    row = {"prompt": TURNS[:1], "completion": TURNS[1:]}
    assert form_of([row], ("completion", "text"), {}, "") == "chat"
    assert form_of([{"prompt": "q", "completion": "a"}], ("completion", "text"), {}, "") == "completion"


def test_columns_that_are_not_read_are_named():
    row = {"premise": "x", "hypothesis": "y", "label": 1}
    assert find_columns([row], {}, "classification", "").unused == ["hypothesis"]
    assert find_columns([row], {"text": ["premise", "hypothesis"]}, "classification", "").unused == []


TEXT = {"text": "x", "label": "a"}
# Each has a form, a row, and names of columns.
WRONG = {
    "no column 'txt'; it has .*; set data.columns.text to text": ("classification", TEXT, {"text": "txt"}),
    "no column 'body'; it has .*; set data.columns.text to one": (
        "classification",
        TEXT,
        {"text": ["body", "text"]},
    ),
    "columns.text_pair names no column that is read; those": ("classification", TEXT, {"text_pair": "text"}),
    "label must be one column, got": ("classification", TEXT, {"label": ["text", "label"]}),
    r"no prompt column .*\['text', 'label'\]; set data.columns.prompt": ("completion", TEXT, {}),
    "set task=chat, which takes them": ("completion", {"messages": TURNS}, {}),
    "has chats in its column 'prompt'; set task=chat": ("completion", {"prompt": TURNS, "answer": TURNS}, {}),
}


@pytest.mark.parametrize("said", WRONG)
def test_columns_that_do_not_fit_are_named(said):
    form, row, given = WRONG[said]
    with pytest.raises(ConfigurationError, match=said):
        find_columns([row], given, form, "data.train")
