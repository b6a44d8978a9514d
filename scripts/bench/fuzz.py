"""Does any random case differ from the oracles of tests/oracle, which compute it without dynrank?

The engine's cases are whole runs: a small model with an optimizer, a schedule and a trainer, resumed at a random step,
beside a dense reference. Those of the seams to users' programs are the rates of steps and the best of validations, each
beside a few lines that say what must come out. A line tells of each case that differs, with what repeats it; the last
lines count the cases. The exit code is 1 if one differs.
Run: .venv/bin/python scripts/bench/fuzz.py [--of engine|rates|best|seams] [--minutes 5] [--cases N]
[--first SEED], or --of … --seed SEED for one case alone
"""

import argparse
import gc
import importlib
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

# The oracles are a part of the suite, which no package contains.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "oracle"))
SEAMS = ("rates", "best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--of", choices=["engine", *SEAMS, "seams"], default="engine", help="seams: both in turn")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--cases", type=int, help="end after so many, whatever time they take")
    parser.add_argument("--first", type=int, help="the first seed; random if left out")
    parser.add_argument("--seed", type=int, help="run this case alone")
    args = parser.parse_args()
    judged = judges(SEAMS if args.of == "seams" else (args.of,))

    torch.set_num_threads(1)
    # accelerate collects garbage at each start, and would go through every imported library.
    gc.freeze()
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    alone = args.seed is not None
    seed = args.seed if alone else random.randrange(10**6) if args.first is None else args.first
    kinds = Counter[str]()
    parts = Counter[str]()
    faults = 0
    most = 1 if alone else args.cases
    end = time.monotonic() + 60 * args.minutes
    while sum(kinds.values()) < most if most else time.monotonic() < end:
        of, judge = judged[seed % len(judged)]
        try:
            kind, fault, left_out = judge(seed)
        except Exception as error:
            if alone:
                raise
            kind, fault, left_out = "failed", f"{type(error).__name__}: {error}", ""
        kinds[f"{of}, {kind}"] += 1
        parts[fault and "differs" or left_out] += 1
        if fault:
            faults += 1
            print(f"--of {of} --seed {seed}: {fault}", flush=True)
        seed += 1
    print(f"{sum(kinds.values())} cases before seed {seed}: {dict(sorted(kinds.items()))}; {faults} differ")
    for reason, count in parts.items():
        print(f"    {count} compared {'in part: ' + reason if reason else 'whole'}")
    sys.exit(int(faults > 0))


def judges(names):
    """[(what it judges, a function of a seed that returns the kind of the case, its fault or "", what was left out)]"""

    def of_engine(seed):
        case = make_case(seed)
        fault, left_out = judge_run(case)
        return case.driver, fault and f"{fault}\n    {case}", left_out

    def of_seam(name):
        seam = importlib.import_module(f"seams.{name}")
        return lambda seed: (*seam.judged(seed), "")

    if names == ("engine",):
        from cases import make_case
        from judge import judged as judge_run

        return [("engine", of_engine)]
    return [(name, of_seam(name)) for name in names]


if __name__ == "__main__":
    main()
