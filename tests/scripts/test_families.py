"""A few families of transformers' models, among them those whose parameters get other names when they are saved."""

import pytest


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "llava", "mixtral", "nomic_bert", "swin", "vit"])
def test_family_trains_resumes_and_goes_to_peft_and_back(family, script):
    families = script("families")
    row = families.row_of(family, families.families()[family])
    assert row["layers"] > 0
    assert {column: row.get(column, row.get("reason")) for column in families.CHECKS} == dict.fromkeys(
        families.CHECKS, "equal"
    )
