"""``squeeze`` and ``inspect`` by gates keep what the loss of a file needs, and say of a wrong file what is wrong."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

import dynrank
from dynrank.adapters.sidecar_files import write_sidecar_files
from dynrank.app.commands.gates import effects, greedy
from dynrank.app.models.pretrained import load_causal_lm, load_classifier, load_tokenizer
from dynrank.errors import ConfigurationError
from dynrank.linalg import truncate_product

# The labels are not in the order of their names.
LABELS = ["so-so", "bad", "good"]
REVIEWS = [{"review": f"{word} film {i % 10}", "label": LABELS[i % 3]} for i in range(64) for word in ("a", "the")][:64]
ROWS = {
    "classification": REVIEWS,
    "completion": [{"prompt": f"def f{i % 8}(x):", "answer": " return x"} for i in range(40)],
}


def written(folder, name, rows):
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def loss_of(model, tokenizer, rows):
    """The mean over examples that are equally long, by hand."""
    model.eval()
    if "review" in rows[0]:
        ids = tokenizer([row["review"] for row in rows], padding=True, return_tensors="pt")
        logits = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits
        return F.cross_entropy(logits, torch.tensor([LABELS.index(row["label"]) for row in rows]))
    losses = []
    for row in rows:
        first = tokenizer(row["prompt"])["input_ids"]
        ids = [*first, *tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        losses.append(F.cross_entropy(logits[len(first) - 1 : -1], torch.tensor(ids[len(first) :])))
    return torch.stack(losses).mean()


@pytest.fixture(params=ROWS)
def job(request, tiny_bert, tiny_llama, tmp_path):
    """(adapter, its file of rows, its loss with and without the direction that the loss needs).

    Of the two directions of the embeddings the large one moves a token that no row has, the small one goes downhill.
    """
    torch.manual_seed(0)
    rows = ROWS[request.param]
    classifies = request.param == "classification"
    base = str(tiny_bert if classifies else tiny_llama)
    model = load_classifier(base, 3) if classifies else load_causal_lm(base)
    tokenizer = load_tokenizer(base)
    name = "word_embeddings" if classifies else "embed_tokens"
    dynrank.add_lora(model, rank=2, alpha=2, target_modules=[name], modules_to_save=["classifier"] * classifies)
    if classifies:
        model.config.id2label = dict(enumerate(LABELS))
        torch.nn.init.normal_(model.classifier.weight)
    ((_, layer),) = dynrank.lora_layers(model)
    used = tokenizer(" ".join(" ".join(row.values()) for row in rows))["input_ids"]
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_A[0, next(i for i in range(layer.lora_A.shape[1]) if i not in {*used, tokenizer.eos_token_id})] = 1
        layer.lora_A[1, used] = 1
    loss_of(model, tokenizer, rows).backward()
    with torch.no_grad():
        downhill = -F.normalize(layer.lora_B.grad[:, 1], dim=0)
        layer.lora_B[:, 1] = 0.03 * downhill
        # The columns stand at right angles, so these two directions are the SVD's.
        layer.lora_B[:, 0] = 1 - downhill * downhill.sum()
        dynrank.save_adapter(model, tmp_path / "adapter")
        write_sidecar_files(tmp_path / "adapter", model, tokenizer)
        losses = [float(loss_of(model, tokenizer, rows))]
        layer.lora_B[:, 1] = 0
        losses.append(float(loss_of(model, tokenizer, rows)))
    assert losses[0] < losses[1] - 0.05
    return tmp_path / "adapter", written(tmp_path, request.param, rows), losses


def test_squeeze_by_gates_keeps_the_small_direction_that_the_loss_needs(job, launch, tmp_path):
    adapter, file, (needed, without) = job
    code, printed, said = launch("squeeze", adapter, "--budget", "50%", "--gates", "--data", file, "--out", "small")
    assert code == 0, said
    before, after = map(
        float, re.search(r"loss +([\d.]+) → ([\d.]+), on the \d+ examples that chose", printed).groups()
    )
    assert (before, after) == pytest.approx((needed, needed), abs=2e-4)
    old, new = (dynrank.read_adapter(folder) for folder in (adapter, "small"))
    (name,) = old.layers
    lora_B, lora_A = old.factors(name)
    kept_B, kept_A = new.factors(name)
    torch.testing.assert_close(kept_B @ kept_A, lora_B[:, 1:] @ lora_A[1:], rtol=1e-4, atol=1e-6)
    assert {path.name for path in (tmp_path / "small").iterdir()} == {path.name for path in adapter.iterdir()}

    rows = [{f"my {name}": value for name, value in row.items()} for row in ROWS[file.stem]]
    columns = [f"--columns={'text' if ours == 'review' else ours}=my {ours}" for ours in ROWS[file.stem][0]]
    arguments = ("--gates", "--data", written(tmp_path, "renamed", rows), *columns)
    code, printed, said = launch("inspect", adapter, *arguments)
    assert code == 0, said
    row = next(line for line in printed.splitlines() if line.startswith("│")).replace(" ", "").split("│")
    # The cells are the rank, and the ranks in half and in a quarter of the parameters.
    assert row[3:4] + row[10:12] == ["2", "1", "1"]


@pytest.mark.parametrize("job", ["classification"], indirect=True)
def test_what_does_not_go_with_gates_is_said_in_one_line(job, launch, tmp_path, tiny_llama):
    adapter, file, _ = job
    other = written(tmp_path, "other", [{"review": "a film", "label": "fine"}] * 40)
    few = written(tmp_path, "few", REVIEWS[:31])
    bare = written(tmp_path, "bare", [{"a": 1}])
    single = adapter / "adapter_model.safetensors"
    gates = ("--gates", "--data", file)
    for source, options, said in (
        (adapter, ("--rank", 1, "--gates"), "--gates needs --data FILE"),
        (adapter, ("--rank", 1, "--data", file), "--data must go with --gates"),
        (adapter, ("--rank", 1, "--gates", "--data", "none.jsonl"), "--data=none.jsonl does not exist"),
        (adapter, ("--rank", 1, "--gates", "--data", bare), "text and label, or messages, or prompt and answer, or"),
        # This is said before a model is loaded, which would fail too.
        (adapter, ("--rank", 1, *gates, "--columns", "text=body", "--model", "none"), "no column 'body'"),
        (
            adapter,
            ("--rank", 1, *gates, "--columns", "system=review"),
            "--columns must name one of ['label', 'text'] for",
        ),
        (adapter, ("--rank", 1, "--gates", "--data", few), "must have at least 32 examples, got 31"),
        (adapter, ("--rank", 1, "--gates", "--data", other), "must be the adapter's, ['so-so', 'bad', 'good'], got"),
        (adapter, ("--rank", 1, *gates, "--model", tiny_llama), "was not trained on --model"),
        (adapter, ("--energy", 0.9, *gates), "--gates takes --rank or --budget, got --energy 0.9"),
        (single, ("--rank", 1, *gates), "--gates takes the folder of a PEFT adapter, got the"),
    ):
        code, _, message = launch("squeeze", source, "--out", "small", *options)
        assert (code, message.count("error:")) == (2, 1)
        assert said in message
        assert not (tmp_path / "small").exists()


# --- effects of directions against finite differences, and the choice of directions against brute force

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])


def losses_of(model):
    """Each example's loss, one at a time; transformers' own loss would be float32."""
    for ids in IDS:
        logits = model(input_ids=ids[None]).logits[0]
        yield F.cross_entropy(logits[:-1], ids[1:])


def test_effects_are_finite_differences_of_the_loss_by_gates(zoo):
    """GPT-2 has adapted embeddings, too. (Llama computes its norms in float32.)"""
    model = zoo.adapted("gpt2", base=zoo.plain("gpt2").double(), dtype=torch.float64)
    layers = dict(dynrank.lora_layers(model))
    found = effects(layers, losses_of(model), scale=8)
    for name, layer in layers.items():
        change = truncate_product(layer.lora_B, layer.lora_A, layer.rank)
        for i in range(layer.rank):
            ends = []
            for gate in (1 + 1e-5, 1 - 1e-5):
                lora_B = change.lora_B.clone()
                lora_B[:, i] *= gate
                layer.set_factors(change.lora_A, lora_B)
                with torch.no_grad():
                    ends.append(torch.stack([*losses_of(model)]))
            torch.testing.assert_close(found[name][:, i], (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)
        layer.set_factors(change.lora_A, change.lora_B)


def test_dropping_all_gates_of_an_expert_stack_counts_every_expert():
    """The loss is linear in B, so the effects of all directions together are the loss itself."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    dynrank.add_lora(model, rank=2, alpha=2, target_modules=["0"], dtype=torch.float64)
    ((name, own),) = dynrank.lora_layers(model)
    own.set_factors(torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64))
    own.num_products = 3
    weights = torch.randn(3, 4, 5, dtype=torch.float64)
    loss = sum((w * (b @ a.detach())).sum() for w, (b, a) in zip(weights, own.products(), strict=True))
    found = effects({name: own}, [loss])
    assert found[name].shape == (1, 2)
    torch.testing.assert_close(found[name].sum(), loss.detach())


def test_directions_without_a_value_have_no_effect(zoo):
    model = zoo.adapted("llama")
    layers = dict(dynrank.lora_layers(model))
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.lora_B[:, 1:] = first.lora_B[:, :1]
    found = effects(layers, losses_of(model))
    assert (found[next(iter(layers))] != 0).sum(1).tolist() == [1, 1, 1]


def test_layer_outside_of_the_loss_is_an_error(zoo):
    model = zoo.adapted("llama")
    layers = dict(dynrank.lora_layers(model))
    first = next(iter(layers.values()))
    with pytest.raises(ConfigurationError, match=r"no gradient of an example in --data reaches 'model\.layers\.0\."):
        effects(layers, [first.lora_B.new_ones((), requires_grad=True) * 2])


def cost(rows, gone, terms=1):
    """The estimate by its definition."""
    gone = [*gone]
    gradient = rows.mean(0)
    hessian = (terms * rows.mT) @ rows / len(rows)
    return float(-gradient[gone].sum() + 0.5 * hessian[gone][:, gone].sum())


@pytest.mark.parametrize("seed", range(5))
def test_each_drop_is_the_cheapest_per_parameter_by_brute_force(seed):
    rows = torch.randn(20, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given = {"a": rows[:, :4], "b": rows[:, 4:]}
    widths = {"a": 5, "b": 9}
    terms = torch.arange(1, 21)
    owner = "aaaabbbbb"
    gone = []
    total = 65
    while total > 14:
        allowed = [i for i in range(9) if i not in gone and sum(owner[j] == owner[i] for j in gone) + 1 < (4, 5)[i > 3]]
        gone.append(
            min(allowed, key=lambda i: (cost(rows, [*gone, i], terms) - cost(rows, gone, terms)) / widths[owner[i]])
        )
        total -= widths[owner[gone[-1]]]
        kept = greedy(given, terms, widths, 1, total)
        assert [*kept["a"].tolist(), *(kept["b"] + 4).tolist()] == [i for i in range(9) if i not in gone]


def test_ranks_end_at_the_lowest_and_layers_below_it_keep_theirs():
    rows = torch.randn(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {"b": rows[:, :4], "a": rows[:, 4:6], "c": rows[:, 6:]}
    kept = greedy(given, torch.ones(20), dict.fromkeys(given, 5), 3, 0)
    assert {name: len(keep) for name, keep in kept.items()} == {"b": 3, "a": 2, "c": 3}


def test_choice_does_not_depend_on_the_order_of_layers_also_with_ties():
    rows = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round()
    given = {name: rows[:, 3 * i : 3 * i + 3] for i, name in enumerate("abcd")}
    expected = greedy(given, torch.ones(6), dict.fromkeys(given, 7), 1, 42)
    found = greedy({n: given[n] for n in "dbca"}, torch.ones(6), dict.fromkeys(given, 7), 1, 42)
    assert {n: keep.tolist() for n, keep in found.items()} == {n: keep.tolist() for n, keep in expected.items()}
