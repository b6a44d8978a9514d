"""Does any random run differ from the oracle of tests/oracle, which computes it densely and without dynrank?

Each case is a small model with an optimizer, a schedule and a trainer, resumed at a random step. A line tells of each
case that differs, with the seed that repeats it; the last lines count the cases. The exit code is 1 if one differs.
Run: .venv/bin/python scripts/bench/fuzz.py [--minutes 5] [--first SEED], or --seed SEED for one case alone
"""

import argparse
import gc
import logging
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

# The oracle is a part of the suite, which no package contains.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "oracle"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--first", type=int, help="the first seed; random if left out")
    parser.add_argument("--seed", type=int, help="run this case alone")
    args = parser.parse_args()
    from cases import make_case
    from judge import judged

    torch.set_num_threads(1)
    # accelerate collects garbage at each start, and would go through every imported library.
    gc.freeze()
    for name in ("lightning.pytorch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    alone = args.seed is not None
    seed = args.seed if alone else random.randrange(10**6) if args.first is None else args.first
    drivers = Counter[str]()
    parts = Counter[str]()
    faults = 0
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        case = make_case(seed)
        try:
            fault, left_out = judged(case)
        except Exception as error:
            if alone:
                raise
            fault = f"{type(error).__name__}: {error}"
            left_out = ""
        drivers[case.driver] += 1
        parts[fault and "differs" or left_out] += 1
        if fault:
            faults += 1
            print(f"--seed {seed}: {fault}\n    {case}", flush=True)
        seed += 1
        if alone:
            break
    print(f"{sum(drivers.values())} cases before seed {seed}: {dict(drivers)}; {faults} differ")
    for reason, count in parts.items():
        print(f"    {count} compared {'in part: ' + reason if reason else 'whole'}")
    sys.exit(int(faults > 0))


if __name__ == "__main__":
    main()
