"""What a user may get wrong on the command line: one message naming value and key, and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynrank.app import train

# {a wrong command: what the message must name}. No library has to be loaded to refuse these.
AT_ONCE = {
    "train lr=1e-4": ["lr is not a configuration key", "optimizer.lr"],
    "train ++rank=8": ["rank is not a configuration key", "lora.rank"],
    "train shedule=fixed": ["shedule", "schedule"],
    "train lora.rnak=8": ["lora.rnak is not a configuration key", "nearest: lora.rank"],
    "train +trainer.max_step=3": ["trainer.max_step is not a configuration key", "nearest: trainer.max_steps"],
    "train +schedule.finl_rank=1": ["schedule.finl_rank is not a configuration key", "nearest: schedule.final_rank"],
    "train schedule=early_buget": ["schedule/early_buget", "early_budget"],
    "train schedule=null": ["schedule=fixed"],
    "train seed=-1 checkpoint_every=0": ["seed", "checkpoint_every"],
    "train lora.rank=0": ["0", "lora.rank"],
    "train optimizer.decay=fast": ["'fast'", "optimizer.decay"],
    "train trainer.max_steps=1e400": ["inf", "trainer.max_steps"],
    "train trainer.fast_dev_run=true": ["must be False, got True", "trainer.fast_dev_run"],
    "train trainer.accumulate_grad_batches=0": ["0", "trainer.accumulate_grad_batches"],
    "train rank_map.file=absent.yaml": ["absent.yaml", "rank_map.file"],
    "train ckpt_path=absent.ckpt": ["'absent.ckpt' does not exist", "ckpt_path"],
    "train task.model=./missing": ["./missing", "task.model"],
    "train lora.from=folder": ["'folder'", "it has no such file", "lora.from"],
    "train +data.val=rows.csv": ["choose task=classification, completion, chat or text"],
    "train task=classification data.train=absent.csv": ["data.train=absent.csv does not exist"],
    "train task=classification data.train=rows.csv": ["no column 'text'", "['body', 'kind']", "data.columns.text"],
    "train task=chat task.model=llama-2-7b data.train=rows.jsonl": ["no column 'messages'", "['text', 'label']"],
    "train task=classification data.train=rows.csv data.columns.text=bdy": [
        "column 'bdy'",
        "data.columns.text=body",
        "['body', 'kind']",
    ],
    "dynrank rnaks": ["rnaks", "ranks"],
    "dynrank ranks lora.rnak=8": ["nearest: lora.rank"],
    "dynrank plan budget=24": ["got 24", "budget"],
    "dynrank sweep lora.rank=4,8": ["'lora.rank=4,8' must be the folder of a sweep (hydra.sweep.dir)"],
    "dynrank inspect absent": ["'absent' must be the folder of an adapter", "it does not exist"],
}
RUN_ALL = """
import contextlib, io, json, sys
from dynrank.app import train
from dynrank.app.commands import cli

said = {}
for command in json.loads(sys.argv[1]):
    name, *words = command.split()
    sys.argv = [name, *words]
    with contextlib.redirect_stderr(io.StringIO()) as message:
        try:
            {"train": train, "dynrank": cli}[name].main()
        except SystemExit as end:
            loaded = sorted({"torch", "lightning", "transformers"} & {*sys.modules})
            said[command] = end.code, message.getvalue(), loaded
print(json.dumps(said))
"""


def test_what_needs_no_library_is_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.csv").write_text("body;kind\nfine;a\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": "dull", "label": "b"}\n')
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", RUN_ALL, json.dumps([*AT_ONCE])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for wrong, named in AT_ONCE.items():
        code, message, loaded = said[wrong]
        assert (code, loaded) == (2, []), (wrong, message)
        assert all(text in message for text in named), (wrong, message)
    # Hydra leaves the empty folder of a run.
    assert sorted(path for path in tmp_path.rglob("*") if "outputs" not in path.parts) == before


CASES = [
    # (overrides, what the message must name); one or two for each that refuses, whose own tests have the others
    # In Lightning's words.
    (["trainer.limit_val_batches=0.01"], ["0.01 of the `val_dataloader`", "`limit_val_batches`", "set trainer"]),
    (["lora.target_modules=[qurey]"], ["qurey", "query", "lora.target_modules"]),
    (["rank_map.file=unmatched.yaml"], ["quary", "query"]),
    (["ckpt_path=last"], ["must hold a checkpoint of a run that has not ended", "hydra.run.dir"]),
    (["trainer=slurm"], ["trainer.devices", "SLURM_NTASKS_PER_NODE"]),
    (["trainer=ddp", "trainer.strategy=ddp_spawn"], ["ddp_spawn", 'strategy="ddp"', "trainer.strategy"]),
    (["schedule.final_rank=64"], ["changes none of the ranks [32]", "64", "schedule.final_rank"]),
    (["objective=val/los"], ["objective must be null or one of", "'val/loss'", "'val/los'"]),
    (["schedule=early_budget", "schedule.share=0.02"], ["stage 1", "27,033", "42,240", "schedule.share"]),
    # Only the run shows these.
    (["optimizer.name=Adamax"], ["Adamax", "optimizer.name", "schedule.how.optimizer_state"]),
    (
        ["trainer=fsdp2", "trainer.accelerator=cpu", "trainer.strategy.tensor_parallel_size=2"],
        ["tensor_parallel_size=1"],
    ),
]


@pytest.mark.parametrize(("overrides", "named"), CASES, ids=lambda value: " ".join(value))
def test_train_refuses_before_training(launch, monkeypatch, overrides, named):
    # The tests themselves may run in a job of Slurm.
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    Path("unmatched.yaml").write_text("rank_pattern: {quary: 8}")
    code, _, message = launch(train.main, "debug=smoke", "hydra.run.dir=run", *overrides)
    assert code == 2
    assert all(text in message for text in named), message
    assert not list(Path("run").rglob("*.csv"))
