"""What a user wrote, checked by annotations: every fault in one message, with its value and the key that fixes it."""

import re
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass
from inspect import signature
from pydoc import render_doc
from typing import Literal

import pytest
from torch import nn

import dynrank
from dynrank import add_lora
from dynrank.errors import ConfigurationError, Count, Name, Share, checked, checked_call, read_as, shown
from dynrank.rank_map import parse_rank_map
from dynrank.schedules import How, Stage, early_budget
from dynrank.targets import Budget
from dynrank.triggers import Plateau


@checked
class Options:
    size: Count
    share: Share | None = None
    mode: Literal["one", "two"] = "one"
    others: Sequence[int] = ()

    def __post_init__(self):
        if self.size == 13:
            raise ConfigurationError("size must not be 13; set where.size")


@checked
class More(Options):
    name: Name = "x"


@checked_call
def area(width: Count, height: Count | Literal["auto"] = "auto", *, options: Options | More | None = None) -> int:
    return width * (1 if height == "auto" else height)


def refusal(call, *args, **kwargs):
    with pytest.raises(ConfigurationError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Options(0), "size must be greater than or equal to 1, got 0; set where.size"),
        (lambda: Options(True), "size must be a valid integer, got True; set where.size"),
        (lambda: Options(1, mode="three"), "mode must be 'one' or 'two', got 'three'; set where.mode"),
        (lambda: Options(1, others=[2, "x"]), "others[1] must be a valid integer, got 'x'; set where.others[1]"),
        (lambda: Options(), "size is missing; set where.size"),
        (lambda: Options(1, shar=1), "shar is unknown; nearest: share; set where.shar"),
        (lambda: Options(13), "size must not be 13; set where.size"),
        (lambda: area(0), "width must be greater than or equal to 1, got 0; set call.width"),
        (lambda: area(1, 2.5), "height must be a valid integer or must be 'auto', got 2.5; set call.height"),
        (lambda: checked_call(lambda n: n)(1, 2), "unexpected"),
    ],
)
def test_a_fault_names_value_and_key(make, message):
    assert message.lower() in refusal(make).lower()


def test_all_faults_are_listed():
    message = refusal(Options, 0, 2.0, "three")
    assert [line.split()[0] for line in message.splitlines()[1:-1]] == ["size", "share", "mode"]
    assert message.splitlines()[-1] == "set where.size, where.share, where.mode"


def test_values_are_kept_and_subclasses_pass():
    assert area(2, 3, options=More(1)) == 6
    assert Options(1, share=1).share == 1.0

    @dataclass(frozen=True)
    class Users(More):
        extra: int = 0

    assert area(2, options=Users(1, extra=3)) == 2


def test_plain_data_becomes_objects_or_one_message():
    assert read_as(dict[str, Options], {"a": {"size": 1, "others": [1, 2]}}, "the file") == {
        "a": Options(1, others=[1, 2])
    }
    message = refusal(read_as, dict[str, Options], {"a": {"size": 0}, "b": {"size": 1, "moed": "one"}}, "the file")
    assert "a.size must be greater than or equal to 1, got 0" in message
    assert "b.moed is unknown; nearest: mode" in message
    assert message.endswith("fix the file")


def test_shown_is_short_for_any_value():
    value: list = []
    for _ in range(30):
        # In the end the value holds 10^30 empty lists.
        value = [value] * 10
    assert len(shown(value)) < 1000
    assert shown("x" * 10**6).count("x") < 250
    assert shown({"a": [1, 2.5, None]}) == "{'a': [1, 2.5, None]}"


SAID = {
    "set schedule.metric=weight (lora.target_modules)": "set metric=weight (target_modules)",
    "set schedule.how.window, or schedule.max_regression=null": "set window, or max_regression=None",
    "data.train=/a/task.model/data.train: set data.columns.text": "train=/a/task.model/data.train: set columns.text",
    "one of --rank, --energy must be given; --no-plot": "one of rank, energy must be given; --no-plot",
    "cannot write to --out '/a/--out'": "cannot write to out '/a/--out'",
    "task.model=data.csv has no 'model.layers.0'": "model=data.csv has no 'model.layers.0'",
}


@pytest.mark.parametrize("said", SAID)
def test_errors_name_keys_on_the_command_line_and_arguments_in_python(said):
    assert str(ConfigurationError(said)) == said
    assert str(Context().run(ConfigurationError, said)) == SAID[said]


def test_a_fault_of_a_call_names_its_argument_alone():
    assert Context().run(refusal, Options, 0) == "size must be greater than or equal to 1, got 0"


def test_signatures_are_plain_for_people_and_their_tools():
    assert str(signature(area)) == (
        f"(width: int, height: Union[int, Literal['auto']] = 'auto', *, "
        f"options: {__name__}.Options | {__name__}.More | None = None) -> int"
    )
    assert str(signature(early_budget)).startswith("(final_rank: int | None = None, *, share: float | None = None, ")
    assert "bytes: int | str | None = None" in str(signature(early_budget))
    assert str(signature(Options)) == str(signature(Options.__init__)).replace("(self, ", "(")


@pytest.mark.parametrize("named", [early_budget, add_lora, Stage, How, Plateau, Budget])
def test_help_shows_no_private_name_and_no_constraint(named):
    said = render_doc(named).partition("Data and other attributes")[0]
    assert not re.search(r"FieldInfo|Annotated|__dataclass_self__|\(.*\b_[a-z]\w*: ", said)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: add_lora(nn.Linear(2, 2), r=4, lora_alpha=8), "rank is missing.*r is rank.*lora_alpha is alpha here"),
        (lambda: add_lora(nn.Linear(2, 2), rank=1, rank_pattern={"q": 2}), "rank_pattern is rank_map here"),
        (lambda: parse_rank_map({"q": {"r": 4, "lora_alpha": 2}}, "here"), "r is rank.*lora_alpha is alpha here"),
        (lambda: early_budget(target_r=4), "target_r is final_rank here"),
        (lambda: dynrank.compose(["lora.r=4"]), "lora.r is not a configuration key; nearest: lora.rank,"),
    ],
)
def test_pefts_names_are_answered_with_ours(call, said):
    assert re.search(said, refusal(call), re.DOTALL)
