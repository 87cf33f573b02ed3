"""The safetensors reader against honest files of the reference library and against hostile ones."""

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trce_cli.errors import BadInput, TrceError
from trce_cli.system.foreign import Identity
from trce_cli.system.safetensors import SafetensorsFile, copy_file, hash_file


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def honest(tmp_path: Path) -> Path:
    path = tmp_path / "honest.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.half": torch.randn(5, 3, generator=generator).half(),
        "a.float": torch.randn(4, generator=generator),
        "c.brain": torch.randn(2, 2, generator=generator).bfloat16(),
        "d.double": torch.randn(3, generator=generator).double(),
        "e.scalar": torch.tensor(2.5),
        "f.empty": torch.empty(0, 3),
        "g.count": torch.arange(7),
    }
    save_file(tensors, path, metadata={"format": "pt", "title": "ünïcode"})
    return path


def test_reads_what_the_reference_library_wrote(honest: Path) -> None:
    file = SafetensorsFile.open(honest)
    assert file.metadata == {"format": "pt", "title": "ünïcode"}
    for name, expected in load_file(honest).items():
        assert file.tensors[name].shape == tuple(expected.shape)
        if expected.is_floating_point():
            assert torch.equal(file.read(name), expected)
            assert file.read(name).dtype == expected.dtype


def test_pieces_and_rows_are_those_of_the_tensor(honest: Path, tmp_path: Path) -> None:
    file = SafetensorsFile.open(honest)
    for name, expected in load_file(honest).items():
        if expected.ndim == 2 and len(expected) > 1 and expected.is_floating_point():
            numbers = torch.tensor([1, 0, 1])
            assert torch.equal(file.rows(name, numbers), expected[numbers])
            with pytest.raises(BadInput, match="rows; row"):
                file.rows(name, torch.tensor([len(expected)]))
    save_file({"a": torch.arange(12.0).reshape(6, 2)}, tmp_path / "a.safetensors")
    file = SafetensorsFile.open(tmp_path / "a.safetensors")
    assert [file.read("a", (piece, 3)).flatten().tolist() for piece in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    path = raw(tmp_path / "odd.safetensors", json.dumps({"a": entry(0, 8)}).encode() + b" ", b"\0\0\x80?" * 2)
    assert SafetensorsFile.open(path).data_start % 4
    assert torch.equal(SafetensorsFile.open(path).read("a"), torch.ones(2))


def test_a_file_is_opened_once_and_a_cut_is_no_signal(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1 << 16)}, path)
    file = SafetensorsFile.open(path)
    save_file({"a": torch.zeros(1 << 16)}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").replace(path)
    assert torch.equal(file.read("a"), torch.ones(1 << 16))
    assert file.identity != Identity.of(path)
    file = SafetensorsFile.open(path)
    os.truncate(path, 1000)
    with pytest.raises(BadInput, match="ends inside of tensor a"):
        file.read("a")


def test_an_edit_changes_only_its_tensors(honest: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    seen: dict[str, torch.dtype] = {}
    done: list[int] = []

    def double(name: str):
        def edit(weight: torch.Tensor) -> torch.Tensor:
            seen[name] = weight.dtype
            return 2 * weight

        return edit

    names = ["b.half", "c.brain", "d.double", "e.scalar", "f.empty"]
    file = SafetensorsFile.open(honest)
    file.write_patched(target, {name: double(name) for name in names}, report=done.append)
    before, after = load_file(honest), load_file(target)
    for name, tensor in before.items():
        assert torch.equal(after[name], 2 * tensor if name in names else tensor)
        assert after[name].dtype == tensor.dtype
    assert seen["b.half"] == seen["c.brain"] == torch.float32
    assert seen["d.double"] == torch.float64
    assert target.read_bytes()[: file.data_start] == honest.read_bytes()[: file.data_start]
    assert sum(done) == file.size - file.data_start


def test_no_edit_is_a_copy(honest: Path, tmp_path: Path) -> None:
    SafetensorsFile.open(honest).write_patched(tmp_path / "one", {})
    copy_file(honest, tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == honest.read_bytes()
    assert hash_file(tmp_path / "one") == hash_file(honest)


def test_new_metadata_keeps_keys_order_and_data(honest: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.safetensors"
    file = SafetensorsFile.open(honest)
    file.write_patched(
        target, {"a.float": lambda weight: weight + 1}, metadata={**file.metadata, "trce": "{}"}
    )
    patched = SafetensorsFile.open(target)
    assert patched.metadata == {"format": "pt", "title": "ünïcode", "trce": "{}"}
    assert list(patched.tensors.items()) == list(file.tensors.items())
    assert patched.data_start % 8 == 0
    expected = load_file(honest)
    expected["a.float"] += 1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(target).items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    save_file({"w": torch.tensor([1.0, bad])}, tmp_path / "in.safetensors")
    with pytest.raises(BadInput, match=r"Tensor w in .*NaN or infinite"):
        SafetensorsFile.open(tmp_path / "in.safetensors").write_patched(tmp_path / "out", {"w": lambda w: w})


def test_a_result_beyond_the_dtype_is_a_failure(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2).half()}, tmp_path / "in.safetensors")
    with pytest.raises(TrceError, match="NaN or infinite values in w") as caught:
        SafetensorsFile.open(tmp_path / "in.safetensors").write_patched(
            tmp_path / "out", {"w": lambda weight: weight * 1e6}
        )
    assert caught.value.exit_code == 1


HOSTILE = {
    "empty": (lambda path: path.write_bytes(b""), "no header"),
    "short": (lambda path: path.write_bytes(b"\x10\0\0"), "no header"),
    "header larger than the file": (lambda path: raw(path, {}, length=10**6), "claims 1,000,000 bytes"),
    "header of 2^63": (lambda path: raw(path, {}, length=2**63), "claims 9,223,372,036,854,775,808 bytes"),
    "not JSON": (lambda path: raw(path, b"{nonsense}"), "cannot be read"),
    "not UTF-8": (lambda path: raw(path, b'{"\xff\xfe": 1}'), "cannot be read"),
    "a list": (lambda path: raw(path, []), "not a JSON object"),
    "deeply nested": (lambda path: raw(path, b'{"a":' * 200_000), "cannot be read"),
    "a huge number": (lambda path: raw(path, b'{"a":' + b"9" * 9999 + b"}"), "cannot be read"),
    "duplicate keys": (
        lambda path: raw(path, b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)),
        "'a' appears twice",
    ),
    "entry without shape": (lambda path: raw(path, {"a": {"dtype": "F32"}}), "exactly dtype, shape"),
    "unknown dtype": (lambda path: raw(path, {"a": entry(0, 8, dtype="F99")}, bytes(8)), "unknown dtype"),
    "dtype no text": (lambda path: raw(path, {"a": entry(0, 8, dtype=["F32"])}, bytes(8)), "unknown dtype"),
    "negative shape": (lambda path: raw(path, {"a": entry(0, 8, (-2,))}, bytes(8)), "not whole numbers"),
    "offsets no numbers": (
        lambda path: raw(path, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, "8"]}}, bytes(8)),
        "not whole numbers",
    ),
    "a thousand dimensions": (lambda path: raw(path, {"a": entry(0, 4, (1,) * 1000)}, bytes(4)), "not whole"),
    "a long name": (lambda path: raw(path, {"a" * 10**6: entry(8, 16)}, bytes(16)), "gap"),
    "backward offsets": (lambda path: raw(path, {"a": entry(8, 0)}, bytes(8)), "does not fill"),
    "wrong size": (lambda path: raw(path, {"a": entry(0, 8, (3,))}, bytes(8)), "does not fill 8 bytes"),
    "a shape of 10^9 times 10^9": (
        lambda path: raw(path, {"a": entry(0, 8, (10**9, 10**9))}),
        "does not fill",
    ),
    "out of range": (lambda path: raw(path, {"a": entry(0, 8)}, bytes(4)), "4 bytes after the end"),
    "overlap": (lambda path: raw(path, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "overlaps"),
    "gap": (lambda path: raw(path, {"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "gap"),
    "trailing bytes": (lambda path: raw(path, {"a": entry(0, 8)}, bytes(12)), "4 bytes after its last"),
    "metadata no text": (lambda path: raw(path, {"__metadata__": {"a": 1}}), "table of strings"),
    "many tensors": (lambda path: raw(path, b'{"data_offsets":' * 100_001), "claims 100,001 tensors"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    write, expected = HOSTILE[kind]
    path = tmp_path / "hostile.safetensors"
    write(path)
    with pytest.raises(BadInput) as caught:
        SafetensorsFile.open(path)
    assert expected in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


def test_a_truncated_file_is_refused(honest: Path) -> None:
    honest.write_bytes(honest.read_bytes()[:-5])
    with pytest.raises(BadInput, match="cut off"):
        SafetensorsFile.open(honest)


def test_pickles_are_refused_as_such(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"w": torch.zeros(3)}, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(BadInput, match="pickle"):
        SafetensorsFile.open(path)
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="pickle"):
        SafetensorsFile.open(path)


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    """0x0280 bytes of header begin the file with the two bytes of pickle protocol 2."""
    text = json.dumps({"a": entry(0, 8)}).encode()
    path = raw(tmp_path / "model.safetensors", text + b" " * (0x0280 - len(text)), bytes(8))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(SafetensorsFile.open(path).read("a"), torch.zeros(2))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.safetensors", Path("/dev/null")):
        with pytest.raises(BadInput):
            SafetensorsFile.open(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"__metadata__": {"a": "\\udfff"}}',
    ],
)
def test_half_a_character_in_a_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = raw(tmp_path / "a.safetensors", header, bytes(8) if b"dtype" in header else b"")
    with pytest.raises(BadInput, match="header cannot be read"):
        SafetensorsFile.open(path)


def test_a_whole_character_in_two_halves_is_read(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", b'{"__metadata__": {"a": "\\ud83d\\udd2a"}}')
    assert SafetensorsFile.open(path).metadata == {"a": "\U0001f52a"}
