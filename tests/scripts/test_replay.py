"""What the prototypes of the cut by gates found, again by the code that ships: the real MiniLM, in training."""

from dynrank import lora_layers


def test_an_early_cut_leaves_the_raw_pooler_most_of_its_directions(script):
    """medical_terms, seed 0: at step 80 of 240 from rank 16 to the parameters of rank 2, by the 20 steps before."""
    study, bench = script("study"), script("study_bench")
    trainee = bench.adapted(bench.Setting(0, 240, bench.TASKS["medical_terms"].overrides), 16, 1e-3)
    gates = study.advance(trainee, 80, 20)
    assert gates.examples == 640
    ranks = bench.budget_ranks(dict(lora_layers(trainee.model)), 2, gates=gates)
    assert ranks.pop("bert.pooler.dense") >= 10
    assert sum(ranks.values()) / len(ranks) < 3
