"""Numbers as they are stored, against torch: rounding, limits, order."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from sqa_convert.checkpoints import dtypes as storage
from sqa_convert.checkpoints.dtypes import FLOATING, check_finite, decode, encode, encoded, tensor_bytes, torch_dtype
from sqa_convert.errors import CheckpointError
from sqa_convert.heads import METHODS, AttentionHeads, Partition

HALVES = torch.arange(-(2**15), 2**15, dtype=torch.int16)
"""every pattern of 16 bits"""


def patterns(dtype):
    """Every number of a narrow dtype; of a wide one random bits, all magnitudes among them."""
    if dtype in ("F16", "BF16"):
        return HALVES.view(torch_dtype(dtype))
    bits = torch.randint(-(2**62), 2**62, (100_000,), dtype=torch.int64) * 2 + torch.randint(0, 2, (100_000,))
    return (bits if dtype == "F64" else bits.to(torch.int32)).view(torch_dtype(dtype))


def test_what_is_no_number_stays_none():
    """Of whatever bits: the largest would be rounded to zero."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7FFF8000, -0x400000], dtype=torch.int32)
    values = bits.view(torch.float32)
    assert values.isnan().all()
    for dtype in FLOATING:
        assert stored(values.numpy(), dtype).isnan().all()
        assert stored(values.double().numpy(), dtype).isnan().all()


def same(made, expected):
    """Bit for bit, but for which NaN it is."""
    expected = expected.contiguous()
    assert made.dtype == expected.dtype and made.shape == expected.shape
    assert torch.equal(made.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert bytes(tensor_bytes(made[number])) == bytes(tensor_bytes(expected[number]))


def stored(array, dtype):
    """The tensor that a file would hold of an array."""
    data = encode(array, dtype)
    made = torch.empty(array.shape, dtype=torch_dtype(dtype))
    made.view(-1).view(torch.uint8).numpy()[:] = data
    return made


@pytest.mark.parametrize("dtype", FLOATING)
def test_numbers_are_read_as_torch_reads_them(dtype):
    values = patterns(dtype)
    expected = values.to(torch.float64 if dtype == "F64" else torch.float32)
    same(torch.from_numpy(decode(tensor_bytes(values), dtype)), expected)
    into = np.full(len(values) + 2, 7, expected.numpy().dtype)
    decode(tensor_bytes(values), dtype, into[1:-1])
    same(torch.from_numpy(into[1:-1]), expected)
    assert into[0] == into[-1] == 7


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_pattern_of_a_narrow_dtype_is_a_number_to_both_or_to_neither(dtype):
    values = patterns(dtype)
    check_finite(tensor_bytes(values[values.isfinite()]), dtype, "a", "b")
    for wrong in values[~values.isfinite()].split(1):
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            check_finite(tensor_bytes(wrong), dtype, "a", "b")


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_numbers_are_rounded_as_torch_rounds_them(dtype, wide):
    """Random ones; those halfway between two, and beside; those too large, and too small."""
    narrow = torch_dtype(dtype)
    exact = HALVES.view(narrow if dtype in ("F16", "BF16") else torch.bfloat16)
    exact = exact[~exact.isnan()].sort().values.to(wide)
    halfway = (exact[1:-2] + exact[2:-1]) / 2  # of neighbours, but for the infinite ones
    near = torch.cat([halfway, torch.nextafter(halfway, exact[:1]), torch.nextafter(halfway, exact[-1:])])
    random = patterns("F32" if wide == torch.float32 else "F64")
    values = torch.cat([exact, near, random[random.isfinite()]])
    if dtype == "F16":  # torch rounds float64 twice, to float32 first; once is nearer
        values = values.float().to(wide)
    same(stored(values.numpy(), dtype), values.to(narrow))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), (40, 33), (33, 40), (16, 1), (1, 16), (70_000, 3)])
def test_what_is_transposed_is_stored_in_order(shape, dtype):
    values = torch.randn(shape)
    same(stored(values.numpy(), dtype), values.to(torch_dtype(dtype)))
    same(stored(values.numpy().T, dtype), (values if values.ndim == 1 else values.T).to(torch_dtype(dtype)))
    same(stored(np.repeat(values.numpy(), 2, -1)[..., ::2], dtype), values.to(torch_dtype(dtype)))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("shape", [(1000,), (30, 33), (33, 30), (7, 5, 9), (3, 400), (100, 1), (3, 0)])
def test_what_is_stored_in_pieces_is_what_is_stored_at_once(shape, dtype, monkeypatch):
    """A row longer than a piece, and a last piece that is not full, among them."""
    monkeypatch.setattr(storage, "_ENCODED", 100)
    values = np.random.default_rng(0).standard_normal(shape, "float32")
    for array in (values, values.T, values.swapaxes(0, 1) if values.ndim == 3 else values[::-1]):
        pieces = list(encoded(array, dtype))
        assert b"".join(pieces) == bytes(encode(array, dtype))
        assert len(pieces) > 1 or array.size <= 100


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.needs_statistics])
@pytest.mark.parametrize("turned", [False, True])
def test_arrays_become_what_tensors_become(method, turned):
    """Bit for bit, whether or not the weights lie transposed in memory."""
    shapes = [(12, 5, 24)] * 4 + [(12, 5)] * 3 + [(24,), (12, 8)]
    weights = [torch.randn(shape) for shape in shapes]
    heads = AttentionHeads(*(t.mT.contiguous().mT if turned and t.ndim > 1 else t for t in weights))
    for counts in ((8, 4), (5, 1), (12, 12), (12, 4)):
        partition = Partition.contiguous(12, *counts)
        expected = METHODS[method].convert(heads, partition, None)
        made = METHODS[method].convert(heads.arrays(), partition, None)
        for name, tensor in vars(expected).items():
            assert isinstance(getattr(made, name), np.ndarray)
            same(torch.from_numpy(getattr(made, name)), tensor)


@pytest.mark.parametrize("method", ["mean", "first", "select"])
def test_what_is_simple_needs_no_torch(method, tmp_path):
    """A conversion that neither measures nor verifies is done before torch would have been imported."""
    script = (
        "import sys\n"
        "from sqa_convert.cli.convert import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    asked = ["--q-groups", "8", "--kv-groups", "4", "--method", method, "--dtype", "bfloat16", "-o", "out", "-q"]
    command = [sys.executable, "-c", script, "sample:gpt2", *asked, "--no-evaluate", "--no-verify"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "out/model.safetensors").exists()
