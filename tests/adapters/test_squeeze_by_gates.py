"""``squeeze`` and ``inspect`` by gates keep what the loss of a file needs, and say of a wrong file what is wrong."""

import csv
import json
import re

import pytest
import torch
import torch.nn.functional as F

import dynrank
from dynrank.adapters.sidecar_files import write_sidecar_files
from dynrank.models.pretrained import load_causal_lm, load_classifier, load_tokenizer

# The labels are not in the order of their names.
LABELS = ["so-so", "bad", "good"]
REVIEWS = [{"review": f"{word} film {i % 10}", "label": LABELS[i % 3]} for i in range(64) for word in ("a", "the")][:64]
ROWS = {
    "classification.csv": REVIEWS,
    "completion.jsonl": [{"prompt": f"def f{i % 8}(x):", "answer": " return x"} for i in range(40)],
    "text.jsonl": [{"text": f"one line of text with {'abcdef'[i % 6]}"} for i in range(40)],
}


def written(folder, name, rows):
    file = folder / name
    if file.suffix == ".csv":
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
    else:
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
        first = tokenizer(row.get("prompt", ""))["input_ids"]
        ids = [*first, *tokenizer(row.get("answer") or row["text"])["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        start = max(1, len(first))
        losses.append(F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:])))
    return torch.stack(losses).mean()


@pytest.fixture(params=ROWS)
def job(request, tiny_bert, tiny_llama, tmp_path):
    """(adapter, its file of rows, its loss with and without the direction that the loss needs).

    Of the two directions of the embeddings the large one moves a token that no row has, the small one goes downhill.
    """
    torch.manual_seed(0)
    rows = ROWS[request.param]
    classifies = request.param.startswith("classification")
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

    rows = [{f"my {name}": value for name, value in row.items()} for row in ROWS[file.name]]
    columns = [f"--columns={'text' if ours == 'review' else ours}=my {ours}" for ours in ROWS[file.name][0]]
    arguments = ("--gates", "--data", written(tmp_path, f"renamed{file.suffix}", rows), *columns)
    code, printed, said = launch("inspect", adapter, *arguments)
    assert code == 0, said
    row = next(line for line in printed.splitlines() if line.startswith("│")).replace(" ", "").split("│")
    # The cells are the rank, and the ranks in half and in a quarter of the parameters.
    assert row[3:4] + row[10:12] == ["2", "1", "1"]


@pytest.mark.parametrize("job", ["classification.csv"], indirect=True)
def test_what_does_not_go_with_gates_is_said_in_one_line(job, launch, tmp_path, tiny_llama):
    adapter, file, _ = job
    other = written(tmp_path, "other.csv", [{"review": "a film", "label": "fine"}] * 40)
    few = written(tmp_path, "few.csv", REVIEWS[:31])
    bare = written(tmp_path, "bare.csv", [{"a": 1}])
    for options, said in {
        ("--gates",): "--gates needs --data FILE",
        ("--data", file): "--data must go with --gates",
        ("--gates", "--data", "none.csv"): "--data=none.csv does not exist",
        ("--gates", "--data", bare): "text and label, or messages, or prompt and answer, or text, with usual names;",
        # This is said before a model is loaded, which would fail too.
        ("--gates", "--data", file, "--columns", "text=body", "--model", "none"): "no column 'body'",
        ("--gates", "--data", few): "must have at least 32 examples, got 31",
        ("--gates", "--data", other): "must be the adapter's, ['so-so', 'bad', 'good'], got ['fine']",
        ("--gates", "--data", file, "--model", tiny_llama): "was not trained on --model",
    }.items():
        code, _, message = launch("squeeze", adapter, "--rank", 1, "--out", "small", *options)
        assert (code, message.count("error:")) == (2, 1)
        assert said in message
        assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("job", ["classification.csv"], indirect=True)
def test_gates_refuse_an_energy_and_a_single_file(job, launch):
    adapter, data, _ = job
    for source, options, said in (
        (adapter, ("--energy", 0.9), "--gates takes --rank or --budget, got --energy 0.9"),
        (adapter / "adapter_model.safetensors", ("--rank", 1), "--gates takes the folder of a PEFT adapter, got the"),
    ):
        code, _, message = launch("squeeze", source, *options, "--out", "small", "--gates", "--data", data)
        assert (code, message.count("error:")) == (2, 1)
        assert said in message
