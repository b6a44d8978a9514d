"""What a user wrote, checked by annotations: every fault in one message, in Python's words, with its arguments."""

import ast
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from pydoc import render_doc
from typing import Literal

import forked
import pytest
import torch
from torch import Tensor, nn

import dynrank
from dynrank import add_lora
from dynrank.app.keys import keys_of, named
from dynrank.errors import (
    ConfigurationError,
    Count,
    DivergedError,
    Name,
    Share,
    checked,
    checked_call,
    described,
    read_as,
    shown,
)
from dynrank.rank_map import parse_rank_map
from dynrank.schedules import How, Stage, early_budget
from dynrank.targets import Budget
from dynrank.triggers import At, Plateau


@checked
class Options:
    size: Count
    share: Share | None = None
    mode: Literal["one", "two"] = "one"
    others: Sequence[int] = ()

    def __post_init__(self):
        if self.size == 13:
            raise ConfigurationError("size must not be 13", "size")


@checked
class More(Options):
    name: Name = "x"


@checked_call
def area(width: Count, height: Count | Literal["auto"] = "auto", *, options: Options | More | None = None) -> int:
    return width * (1 if height == "auto" else height)


def error_of(call, *args, **kwargs):
    with pytest.raises(ConfigurationError) as caught:
        call(*args, **kwargs)
    return caught.value


def refusal(call, *args, **kwargs):
    return str(error_of(call, *args, **kwargs))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Options(0), "size must be greater than or equal to 1, got 0"),
        (lambda: Options(True), "size must be a valid integer, got True"),
        (lambda: Options(1, mode="three"), "mode must be 'one' or 'two', got 'three'"),
        (lambda: Options(1, others=[2, "x"]), "others[1] must be a valid integer, got 'x'"),
        (lambda: Options(), "size is missing"),
        (lambda: Options(1, shar=1), "shar is unknown; nearest: share"),
        (lambda: Options(13), "size must not be 13"),
        (lambda: area(0), "width must be greater than or equal to 1, got 0"),
        (lambda: area(1, 2.5), "height must be a valid integer or must be 'auto', got 2.5"),
    ],
)
def test_a_fault_names_argument_and_value(make, message):
    error = error_of(make)
    assert (str(error), error.arguments) == (message, (message.split()[0],))


def test_too_many_arguments_are_refused():
    assert "unexpected" in refusal(checked_call(lambda n: n), 1, 2).lower()


def test_all_faults_are_listed():
    error = error_of(Options, 0, 2.0, "three")
    assert [line.split()[0] for line in str(error).splitlines()[1:]] == ["size", "share", "mode"]
    assert error.arguments == ("size", "share", "mode")


@pytest.mark.parametrize("kind", [ConfigurationError, DivergedError])
def test_an_error_reaches_other_processes_whole(kind):
    error = pickle.loads(pickle.dumps(kind("a must be b", "a", "how.b")))
    assert (type(error), str(error), error.arguments) == (kind, "a must be b", ("a", "how.b"))


@dataclass
class Users(Plateau):
    weights: Tensor = field(default_factory=lambda: torch.zeros(2))
    seen: int = field(default=0, init=False)

    def fires(self, value):
        self.seen += 1
        return False


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Budget(final_rank=4), "Budget(final_rank=4)"),
        (Budget(0), "Budget(parameters=0)"),
        (Plateau(), "Plateau()"),
        (Options(1, others=[2]), "Options(size=1, others=[2])"),
        (early_budget(4)[0], "Stage(when=At(fraction=0.3333), to=Budget(final_rank=4), how=How(lr_factor='sqrt'))"),
        ([At(step=0)], "[At(step=0)]"),
    ],
)
def test_a_value_is_shown_by_what_was_given(value, text):
    assert repr(value) == described(value) == text


def test_a_trigger_of_a_user_is_described_without_its_state():
    trigger = Users("val/x")
    trigger.fires(1.0)
    assert described(trigger) == "Users(monitor='val/x')"
    assert described(Users(weights=torch.ones(2))) == "Users(weights=tensor([1., 1.]))"


def test_values_are_kept_and_subclasses_pass():
    assert area(2, 3, options=More(1)) == 6
    assert Options(1, share=1).share == 1.0

    @dataclass(frozen=True)
    class Mine(More):
        extra: int = 0

    assert area(2, options=Mine(1, extra=3)) == 2


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


# Who names the keys


WRONG = {"final_rank": 4, "highest": 2, "lowest": 3}
IN_PYTHON = f"""
import sys
from dynrank import ConfigurationError
from dynrank.schedules import early_budget
try:
    early_budget(**{WRONG})
except ConfigurationError as error:
    print(error, error.arguments)
assert not [name for name in sys.modules if name.startswith(("dynrank.app", "hydra"))]
"""


def test_one_fault_names_arguments_in_python_and_keys_on_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", IN_PYTHON], cwd=tmp_path, capture_output=True, text=True, check=True)
    said = "highest must be at least lowest = 3, got 2"
    assert done.stdout == f"{said} ('highest', 'lowest')\n"
    overrides = [f"schedule.{name}={value}" for name, value in WRONG.items()]
    code, printed = forked.run(forked.TRAIN, "debug=smoke", "hydra.run.dir=run", *overrides, cwd=tmp_path)
    assert code == 2
    assert printed.splitlines()[-1] == f"error: {said} (schedule.highest, schedule.lowest)"


@pytest.mark.parametrize(
    ("overrides", "argument", "key"),
    [
        ([], "how.max_regression", "schedule.how.max_regression"),
        ([], "max_regression", "schedule.how.max_regression"),
        ([], "share", "schedule.share"),
        ([], "rank", "lora.rank"),
        ([], "lr", "optimizer.lr"),
        ([], "optimizer", "optimizer.name"),
        ([], "dirpath", "hydra.run.dir"),
        ([], "ckpt_path", "ckpt_path"),
        ([], "strategy", "trainer.strategy"),
        ([], "max_steps", "trainer.max_steps"),
        ([], "model", "task.model"),
        ([], "quantization", "model.quantization"),
        ([], "form", "data.form"),
        ([], "rank_map", "rank_map"),
        ([], "patience", None),
        (["schedule=energy"], "patience", "schedule.trigger.patience"),
        (["schedule=milestones"], "ranks[1]", "schedule.ranks[1]"),
        (["schedule=stages", "schedule.stages=[{_target_: dynrank.schedules.Stage}]"], "to", "schedule.stages[0].to"),
    ],
)
def test_an_argument_has_its_key_in_the_composed_configuration(overrides, argument, key):
    config = dynrank.compose(["task=classification", *overrides])
    assert keys_of(config)(argument) == key


def test_keys_are_added_once_and_a_note_and_the_cause_stay():
    cause = OSError("full")
    raised = DivergedError("a must be b", "a", "c")
    raised.add_note("found")
    with pytest.raises(DivergedError) as caught, named(str.title), named({"a": "group.a"}.get):
        raise raised from cause
    assert str(caught.value) == "a must be b (group.a)"
    assert (caught.value.__cause__, caught.value.__notes__) == (cause, ["found"])


LIBRARY = Path(dynrank.__file__).parent
# Folders and files whose strings may name keys.
KEY = re.compile(
    r"(?<![\w./])(?:schedule|lora|optimizer|trainer|task|data|model|rank_map|hydra)\.(?!py\b|yaml\b|safetensors\b)[a-z_]+"
    r"|\bckpt_path\b(?=[=)])|(?<![\w-])--[a-z]|\b(?:schedule|trainer|optimizer|debug)=(?!\w*\()\w"
)
# What a key may look like and is not: attributes of objects in Python, names of modules, options of other programs.
PYTHON = re.compile(
    r"(?:\btrainer\.)?\b(?:test\(|fit\(\w+, )ckpt_path="
    r"|\b(?:model|optimizer|trainer)\.(?:\w+\(|\w+`|(?:layers|param_groups|state|parameters|callbacks|global_step)\b)"
    r"|\btrainer\.(?:save_(?:checkpoint|model)|add_callback)\b"
)
# Lines of a shell that an export advises.
OTHER_PROGRAMS = re.compile(r"--(?:lora|model-path|revision|enable-|max-lora-rank|nproc_per_node)[\w-]*")


def strings():
    """(place, text) of every string constant of the library, those in f-strings and the docstrings, too."""
    for file in sorted([*LIBRARY.rglob("*.py"), *(LIBRARY / "kernels").glob("*.py")]):
        relative = file.relative_to(LIBRARY)
        if relative.parts[0] not in ("app", "conf"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{relative}:{node.lineno}", node.value


def test_no_string_of_the_library_names_a_key_or_an_option_of_the_application():
    found = {place: OTHER_PROGRAMS.sub("", PYTHON.sub("", text)) for place, text in strings()}
    assert {place: text for place, text in found.items() if KEY.search(text)} == {}


@pytest.mark.parametrize(
    "text",
    ["set schedule.how.optimizer_state", "give --rank", "(lora.rank)", "set ckpt_path=last", "schedule=fixed helps"],
)
def test_a_key_in_a_string_would_be_found(text):
    assert KEY.search(OTHER_PROGRAMS.sub("", PYTHON.sub("", text)))


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
