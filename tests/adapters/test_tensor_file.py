"""One tensor at a time, and the same file as safetensors itself would read and write."""

import pytest
import torch
from dynrank.adapters.tensor_file import TensorFile, TensorWriter, piece_of
from safetensors.torch import load_file, save_file

from dynrank.errors import ConfigurationError

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "single": torch.randn(2, 3, 1),
    "double": torch.randn(4, 4, dtype=torch.float64),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
}


def test_reads_what_safetensors_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "a", metadata={"format": "pt"})
    with TensorFile(tmp_path / "a") as file:
        assert file.metadata == {"format": "pt"}
        assert {name: torch.Size(piece.shape) for name, piece in file.pieces.items()} == {
            name: tensor.shape for name, tensor in TENSORS.items()
        }
        for name in ("half", "single", "double"):
            assert torch.equal(file.tensor(name), TENSORS[name])


def test_safetensors_reads_what_is_written_in_any_order(tmp_path):
    save_file(TENSORS, tmp_path / "a")
    with TensorFile(tmp_path / "a") as file:
        pieces = file.pieces | {"half": piece_of("BF16", (5, 2))}
        with TensorWriter(tmp_path / "b", pieces, {"format": "pt"}) as writer:
            for name in reversed(pieces):
                writer.write(name, TENSORS["half"].mT[:, :2] if name == "half" else file.chunks(name))
    copied = load_file(tmp_path / "b")
    assert set(copied) == set(TENSORS)
    for name, tensor in (TENSORS | {"half": TENSORS["half"].mT[:, :2]}).items():
        assert copied[name].dtype == tensor.dtype
        assert torch.equal(copied[name], tensor)
    assert (tmp_path / "b").read_bytes()[8:].index(b"{") == 0
    assert int.from_bytes((tmp_path / "b").read_bytes()[:8], "little") % 8 == 0


def test_writer_tells_of_a_tensor_that_did_not_come_or_has_another_size(tmp_path):
    pieces = {"x": piece_of("F32", (2,))}
    with pytest.raises(RuntimeError, match="not written.*'x'"), TensorWriter(tmp_path / "a", pieces, {}):
        pass
    with TensorWriter(tmp_path / "b", pieces, {}) as writer, pytest.raises(RuntimeError, match="8 bytes"):
        writer.write("x", torch.zeros(3))


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 100], ids=["empty", "no header", "noise"])
def test_refuses_what_is_no_safetensors_file(content, tmp_path):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigurationError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "a")
