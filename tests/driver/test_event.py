"""What an event and a history say: in one line, in a table, in an interactive session; short, whatever the model."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import dynrank
from dynrank.change.reports import LayerReport
from dynrank.driver.driver import RankDriver
from dynrank.driver.event import Measured, RankEvent
from dynrank.driver.reserved import highest_ranks, slot_notice
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, after_convergence, auto, early_budget, energy, fixed, milestones
from dynrank.schedules.stage import as_texts
from dynrank.targets import Budget, GrowTo, LayerState, Rank, Target
from dynrank.triggers import At, Gap, Plateau, Run

BLOCKS = 28
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj")


def reports():
    values = tuple(float(16 - i) for i in range(16))
    names = [f"model.layers.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS]
    return tuple(LayerReport(name, 16, 4, 0.9, 0.1, values, 64, 0.01, 0.001) for name in names)


MEASURED = Measured("eval_loss", 1.5, 1.75)
CUT = RankEvent(50, "fraction 0.5", reports(), measured=MEASURED, lr_factor=2.0655)
UNDONE = RankEvent(80, f"undone: {MEASURED} (fraction 0.8)", reports(), undone=True, measured=MEASURED)
SEARCHED = RankEvent(99, f"fraction 1: 20 of 40 directions, {MEASURED}", reports(), measured=MEASURED)


def text(table):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def test_a_cut_says_what_it_costs_and_what_becomes_of_the_rate():
    said = "rank change at step 50: fraction 0.5; eval_loss 1.5 → 1.75 by the cut; adapter's rate × 2.07 from here"
    assert str(CUT) == f"{said} (rank 16 → rank 4 in {len(CUT.layers)} layers)"
    assert said in text(CUT.table())
    assert "rate" not in str(replace(CUT, lr_factor=1.0))


@pytest.mark.parametrize("event", [UNDONE, SEARCHED], ids=["undone", "searched"])
def test_what_the_reason_says_already_is_not_said_again(event):
    assert str(event).count("eval_loss 1.5 → 1.75") == 1
    assert str(event).count("undone") == (1 if event.undone else 0)
    assert event.reason_and_cost == event.reason


def test_in_a_session_a_run_is_a_short_table_that_counts_what_was_saved():
    driver = RankDriver(4)
    assert (driver.history, repr(driver.history)) == ([], "[]")
    driver.progress.history = [CUT, UNDONE]
    shown = text(driver.history.table())
    saved = sum(12 * layer.params_per_rank for layer in CUT.layers)
    assert f"│ × 2.07 │ {saved:,} │" in shown
    assert "16 → 4, undone │ × 1 │ 0 │" in shown
    for thing in (driver.history, CUT, UNDONE):
        assert len(repr(thing).splitlines()) < 20, thing
    assert all("16.0, 15.0" not in repr(thing) for thing in (driver.history, CUT, CUT.layers[0]))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    layers = {
        f"layers_{i}": torch.nn.ModuleDict({kind: torch.nn.Linear(6, 6) for kind in KINDS}) for i in range(BLOCKS)
    }
    model = dynrank.add_lora(torch.nn.ModuleDict(layers), rank=4, alpha=4, rank_map={r"layers_0\..*": 2})
    for layer in dict(dynrank.lora_layers(model)).values():
        torch.nn.init.normal_(layer.lora_B)
    dynrank.save_adapter(model, tmp_path_factory.mktemp("stored") / "adapter")
    return tmp_path_factory.getbasetemp() / "stored0" / "adapter"


def test_stored_adapters_are_short_tables_and_lists(adapter, tmp_path):
    found = dynrank.inspect(adapter)
    squeezed = dynrank.squeeze(adapter, tmp_path / "small", rank=2)
    for layers in (found, squeezed):
        assert isinstance(layers, list)
        assert len(layers) == BLOCKS * len(KINDS)
        assert len(repr(layers).splitlines()) < 20
    total = sum(layer.parameters for layer in found)
    assert f"│ all │ 112 │ 2-4 │ 4 │ {max(layer.singular_values[0] for layer in found):.3g} │" in text(found.table())
    assert f"{total:,} │" in text(found.table())
    assert "│ all │ 112 │ 2-4 → 2 │" in text(squeezed.table())
    assert f"{sum(layer.parameters_saved for layer in squeezed):,} │" in text(squeezed.table())


class Half(Target):
    """A user's own, which is no dataclass."""

    def __init__(self, least=1):
        self.least = least

    def ranks(self, layers):
        return {name: layer.shrunk(max(self.least, layer.rank // 2)) for name, layer in layers.items()}


def test_values_are_shown_as_the_calls_that_make_them():
    """Without what is a default, in a list, in an error; a user's target without its address."""
    values = [*early_budget(4), *auto(), How(), Budget(share=0.5), Rank(4), At(step=3), Plateau(), Gap(), Half(2)]
    values += [LayerState(4, values=torch.ones(16)), *CUT.layers[:1], Stage(At(step=3), Half(2))]
    assert not [shown for shown in map(repr, values) if "None" in shown or "object at" in shown or "tensor" in shown]
    names = {cls.__name__: cls for cls in (How, Budget, Rank, At, Plateau, Gap, Half, Stage)}
    for value in values[:-2]:
        if not isinstance(value, LayerState):
            assert as_texts([Stage(At(step=1), Rank(1))])
            assert repr(eval(repr(value), names)) == repr(value)
    with pytest.raises(ConfigurationError, match=r"got \[Budget\(final_rank=4\)\]$"):
        RankDriver([Budget(final_rank=4)])


def model(**options):
    blocks = torch.nn.ModuleDict({kind: torch.nn.Linear(24, 24) for kind in KINDS})
    return dynrank.add_lora(blocks, rank=16, alpha=16, **options)


PINNED = {"q_proj": {"pinned": True}}
CAPPED = dict.fromkeys(KINDS, {"highest": 8})


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        (early_budget(4), {}, "up to 16; highest=8 limits it"),
        (early_budget(8) + early_budget(4, at=0.6), {}, "up to 16; highest=8 limits it"),
        (auto(), {}, "up to 16; highest=8 limits it"),
        (after_convergence(4), {}, "up to 16; highest=8 limits it"),
        (early_budget(12), {}, None),
        (early_budget(4, highest=8), {}, None),
        (early_budget(4), {"rank_map": CAPPED}, None),
        # No limit of the schedule lowers a pinned layer; one of the rank map does not raise it.
        (early_budget(2), {"rank_map": PINNED}, "up to 16"),
        (early_budget(4, lowest=3), {"rank_map": {"q_proj": {"highest": 16}}}, "up to 16; highest=8 limits it"),
        # Uniform ranks, or ones that are known.
        (after_convergence(4, shared=False), {}, None),
        (milestones([8, 4], at=[0.5, 0.75]), {}, None),
        ([Stage(At(fraction=0.5), Rank({"attention": 2}))], {}, None),
        ([*early_budget(4), Stage(At(fraction=0.5), Rank(4))], {}, None),
        (fixed(), {}, None),
        ([*early_budget(2), Stage(At(fraction=0.5), GrowTo(4))], {}, "up to 16; highest=8 limits it"),
        # Nothing limits these.
        (energy(0.9), {}, "up to 16"),
    ],
)
def test_before_training_a_line_says_what_a_server_may_reserve_and_what_limits_it(schedule, options, said):
    notice = slot_notice(model(**options), schedule)
    assert notice == (said and f"a server reserves the highest rank in every layer, {said}")
    if said and "limits" in said:
        assert slot_notice(model(**options), schedule, name="schedule.highest") == notice.replace(
            "highest=", "schedule.highest="
        )
        assert slot_notice(model(**options), schedule, name=None) == notice.partition(";")[0]


@pytest.mark.parametrize("skewed", KINDS)
@pytest.mark.parametrize("schedule", [early_budget(4, at=0.5), early_budget(4, at=0.5, highest=8), auto(at=0.5)])
def test_no_layer_ends_above_what_was_said_and_one_can_reach_it(schedule, skewed):
    states = {kind: LayerState(16, 24, 24, importance=float(kind == skewed)) for kind in KINDS}
    made = model()
    highest = highest_ranks(made, schedule)
    ranks = schedule[0].to.ranks(states)
    assert all(ranks[name] <= highest[name] for name in KINDS)
    # The pool of 64 directions has enough for one layer.
    assert ranks[skewed] == min(13, highest[skewed])


class Loop(Training):
    """Validations that come to these values, one after the other."""

    values = ()

    def validate(self):
        first, *type(self).values = type(self).values
        return {"val/loss": first}


@pytest.mark.parametrize("undone", [True, False])
def test_what_was_measured_is_in_the_event_also_if_it_was_undone(undone):
    Loop.values = [1.0, 2.0 if undone else 1.0]
    made = model()
    loop = Loop(made, [torch.optim.SGD(dynrank.adapter_parameters(made))])
    driver = RankDriver(Stage(At(step=0), Rank(4), how=How(lr_factor="sqrt", max_regression=0.1)))
    driver.start(loop, Run(5))
    driver.advance(loop)
    (event,) = driver.history
    assert event.undone == undone
    assert (event.measured.metric, event.measured.before, event.measured.after) == (
        "val/loss",
        1.0,
        2.0 if undone else 1.0,
    )
    assert event.lr_factor == driver.lr_factor == (1.0 if undone else 2.0)
    assert ("× 2 from here" in str(event)) != undone
    again = RankDriver(Stage(At(step=0), Rank(4), how=How(lr_factor="sqrt", max_regression=0.1)))
    again.load_state_dict(driver.state_dict())
    assert again.history == driver.history
