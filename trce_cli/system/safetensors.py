"""The safetensors format, owned: a checked header, tensors read one by one, edits that keep every other byte.

Layout: 8 bytes little-endian header length, a JSON header, the tensors' bytes without gaps.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from trce_cli.errors import BadInput, TrceError
from trce_cli.system.foreign import Identity, open_regular
from trce_cli.system.progress import Report, no_report

if TYPE_CHECKING:
    import torch

CHUNK = 16 << 20  # bytes moved between two progress reports
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_TENSORS = 100_000  # the largest checkpoints of the known families hold about 4,000

# Bits an element, for every dtype of the format: a file may hold tensors that we never touch.
BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# The dtypes that can be edited, and all that can be read, by their names in torch.
FLOATS = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"},
}
READABLE = FLOATS | {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
}

PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip archive, pickle protocols

Edit = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: the format's dtype name, shape, and byte offsets from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Handle:
    """A file that stays open as long as somebody has this."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file with a checked header; nothing else of it is in memory.

    It is opened once, so that all that is read of it is of one file, whatever the path leads to later, and it
    is read, never mapped: pages of a file that somebody cuts would end the process. `tensors` keeps the
    header's order. `data_start` is the offset in bytes of the first tensor's data. `identity`: when it was
    opened.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    identity: Identity
    _handle: _Handle = field(repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and check the header; `BadInput` says in one sentence what is wrong with the file."""
        handle = _Handle(open_regular(path))
        try:
            with open(handle.number, "rb", closefd=False) as file:
                return cls._parse(path, file, handle)
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror}.") from error

    @classmethod
    def _parse(cls, path: Path, file: BinaryIO, handle: _Handle) -> "SafetensorsFile":
        identity = Identity.of(handle.number)
        size = identity.size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        start = file.read(1)
        if start != b"{" and prefix[:2] in PICKLES:
            raise BadInput(
                f"{path} is a PyTorch pickle, not a safetensors file; loading a pickle can run code.",
                "Get the safetensors form of this checkpoint.",
            )
        if prefix + start == b"version h":
            raise BadInput(
                f"{path} is a Git LFS pointer, which names the file and is not it.",
                "Get the file itself, with `git lfs pull` or from where it is published.",
            )
        if len(prefix) < 8 or length < 2:
            raise _broken(path, f"it has {size} bytes and no header")
        if length > size - 8:
            raise _broken(path, f"its header claims {length:,} bytes and the file has {size:,}")
        if length > MAX_HEADER:
            raise _broken(
                path, f"its header of {length:,} bytes is above the format's limit of {MAX_HEADER:,}"
            )
        text = start + file.read(length - 1)
        if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
            raise _broken(path, f"its header claims {count:,} tensors; at most {MAX_TENSORS:,} are accepted")
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
            if re.search(rb"\\u[dD][89a-fA-F]", text):  # half of a character, which no file can hold
                json.dumps(header, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise _broken(path, f"its header cannot be read ({str(error)[:120]})") from error
        if not isinstance(header, dict):
            raise _broken(path, "its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _broken(path, "its metadata is not a table of strings")
        tensors = {name: _tensor_info(path, name, entry) for name, entry in header.items()}
        _check_tiling(path, tensors, size - 8 - length)
        return cls(path, tensors, metadata, 8 + length, size, identity, handle)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str, piece: tuple[int, int] = (0, 1)) -> "torch.Tensor":
        """Read one tensor in the file's dtype (one of `READABLE`); the copy is private and writable.

        piece: (1, 3) for the second third of its rows.
        """
        import torch

        info, dtype = self.tensors[name], self._dtype(name)
        size = (info.end - info.begin) // piece[1]
        buffer = bytearray(size)
        self._fill(buffer, info.begin + piece[0] * size, name)
        shape = (info.shape[0] // piece[1], *info.shape[1:]) if piece[1] > 1 else info.shape
        if not buffer:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)

    def rows(self, name: str, numbers: "torch.Tensor") -> "torch.Tensor":
        """Some rows of a tensor, (numbers, ...): nothing else of it is read.

        numbers: int64. BadInput for one that is not there.
        """
        import torch

        info, dtype = self.tensors[name], self._dtype(name)
        count, *inner = info.shape
        size = math.prod(inner) * dtype.itemsize
        wanted, places = torch.unique(numbers, return_inverse=True)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < count:
            raise BadInput(f"{name} in {self.path} has {count:,} rows; row {int(wanted[-1]):,} is asked for.")
        buffer = bytearray(len(wanted) * size)
        for place, number in enumerate(wanted.tolist()):
            row = memoryview(buffer)[place * size : (place + 1) * size]
            self._fill(row, info.begin + number * size, name)
        if not buffer:
            return torch.empty((len(numbers), *inner), dtype=dtype)
        return torch.frombuffer(buffer, dtype=dtype).reshape(-1, *inner)[places]

    def _fill(self, buffer: bytearray | memoryview, offset: int, name: str) -> None:
        """Read from the data into the whole buffer."""
        view, position = memoryview(buffer), self.data_start + offset
        while view:
            try:
                count = os.preadv(self._handle.number, [view], position)
            except OSError as error:
                raise BadInput(f"{self.path} cannot be read: {error.strerror}.") from error
            if not count:
                raise _broken(self.path, f"it ends inside of tensor {name}")
            view, position = view[count:], position + count

    def _dtype(self, name: str) -> "torch.dtype":
        import torch

        if (dtype := self.tensors[name].dtype) not in READABLE:
            raise BadInput(f"Tensor {name} in {self.path} has the dtype {dtype}, which cannot be read.")
        found: torch.dtype = getattr(torch, READABLE[dtype])
        return found

    def write_patched(
        self,
        target: Path,
        edits: Mapping[str, Edit],
        metadata: Mapping[str, str] | None = None,
        report: Report = no_report,
    ) -> None:
        """Write this file to `target` with edit(tensor) in place of each tensor of `edits`.

        An edit gets the tensor in fp32 (fp64 stays fp64), keeps its shape, and is rounded to the
        file's dtype. One tensor is in memory at a time; every other byte is copied. With `metadata` the
        header is rewritten (same keys, same order) with that metadata; without, it stays as it is.
        Raises `BadInput` for NaN or infinite weights in a tensor to be edited, `TrceError` for a
        non-finite result.
        """
        import torch

        with open(self._handle.number, "rb", closefd=False) as source, target.open("wb") as out:
            start = self.data_start
            if metadata is None:
                _copy_range(self.path, source, out, 0, start, no_report)
            else:
                header = encode_header(self.tensors, metadata)
                out.write(header)
                start = len(header)
            position = 0  # in the data
            for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
                if name not in edits:
                    continue
                _copy_range(self.path, source, out, self.data_start + position, info.begin - position, report)
                edited = rounded_edit(edits[name], self.read(name), f"{name} in {self.path}")
                out.write(edited.view(-1).view(torch.uint8).numpy().data)
                report(info.end - info.begin)
                position = info.end
            _copy_range(
                self.path,
                source,
                out,
                self.data_start + position,
                self.size - self.data_start - position,
                report,
            )
            assert out.tell() - start == self.size - self.data_start


def rounded_edit(edit: Edit, weight: "torch.Tensor", what: str) -> "torch.Tensor":
    """edit(weight) as it is stored: computed in fp32 (fp64 stays fp64), rounded to the weight's dtype.

    `what` names the tensor in errors: `BadInput` for a dtype that cannot be edited and for NaN or infinite
    weights, `TrceError` for a non-finite result.
    """
    import torch

    dtype = str(weight.dtype).removeprefix("torch.")
    if dtype not in FLOATS.values():
        raise BadInput(
            f"Tensor {what} has the dtype {dtype}, which cannot be edited.",
            f"Dtypes that can: {', '.join(FLOATS)}.",
        )
    if not all_finite(weight):
        raise BadInput(f"Tensor {what} holds NaN or infinite values.", "Nothing was written.")
    wide = weight if weight.dtype == torch.float64 else weight.float()
    edited = edit(wide).detach().to("cpu", weight.dtype).contiguous()
    if edited.shape != weight.shape:
        raise ValueError(f"edit of {what} gave shape {tuple(edited.shape)}, not {tuple(weight.shape)}")
    if not all_finite(edited):
        raise TrceError(
            f"The edit gives NaN or infinite values in {what} ({dtype}).",
            "Use a lower strength; nothing was written.",
        )
    return edited


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before its data: length and JSON header, with the tensors in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in tensors.items():
        offsets = [info.begin, info.end]
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written: the format's dtype name, its shape, and how to make it in the end."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], "torch.Tensor"]


def write_tensors(
    target: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str], report: Report = no_report
) -> None:
    """Write a new file of these tensors in their order, each of which is made only when it is its turn."""
    import torch

    position, infos = 0, {}
    for name, new in tensors.items():
        end = position + -(-math.prod(new.shape) * BITS[new.dtype] // 8)
        infos[name] = TensorInfo(new.dtype, new.shape, position, end)
        position = end
    with target.open("wb") as out:
        out.write(encode_header(infos, metadata))
        for name, info in infos.items():
            tensor = tensors[name].make().detach().cpu().contiguous()
            if tensor.shape != info.shape or str(tensor.dtype) != f"torch.{READABLE[info.dtype]}":
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not as announced: {info}")
            out.write(tensor.view(-1).view(torch.uint8).numpy().data)
            report(info.end - info.begin)


def all_finite(tensor: "torch.Tensor") -> bool:
    """Whether no value is NaN or infinite, found without a temporary of the tensor's size."""
    import torch

    if tensor.element_size() == 1:  # torch does not compare fp8
        return all(bool(torch.isfinite(part.half()).all()) for part in tensor.reshape(-1).split(1 << 24))
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def hash_file(path: Path, report: Report = no_report) -> str:
    """SHA-256 of a file in hex, streamed."""
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            report(count)
    return digest.hexdigest()


def copy_file(source: Path, target: Path, report: Report = no_report) -> None:
    """Copy a file's bytes (not its mode) by the operating system."""
    with os.fdopen(open_regular(source), "rb") as read, target.open("xb") as write:
        _copy_range(source, read, write, 0, os.fstat(read.fileno()).st_size, report)


_FICLONE = 0x40049409  # Linux: let two files share their blocks until one of them is written to


def share_file(source: Path, target: Path) -> bool:
    """Make `target` of the bytes of `source` without copying them; False where the file system cannot.

    A reflink where there are any (the two stay independent), else a hard link (the two are one file).
    """
    import fcntl

    try:
        with source.open("rb") as read, target.open("wb") as write:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        return True
    except OSError:
        target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
        return True
    except OSError:  # another file system, or one without links
        return False


def _copy_range(
    what: Path, source: BinaryIO, target: BinaryIO, offset: int, count: int, report: Report
) -> None:
    """Append `count` bytes of the file `what` from `offset` to target; in the kernel where it can."""
    target.flush()
    while count and sys.platform == "linux":  # elsewhere sendfile is for sockets only
        done = os.sendfile(target.fileno(), source.fileno(), offset, min(count, CHUNK))
        if not done:
            break
        offset, count = offset + done, count - done
        report(done)
    source.seek(offset)
    while count:
        block = source.read(min(count, CHUNK))
        if not block:
            raise TrceError(f"{what} became shorter while it was being copied.")
        target.write(block)
        count -= len(block)
        report(len(block))
    target.seek(0, os.SEEK_END)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {_short(twice)} appears twice")
    return table


_ENTRY: Final = {"dtype", "shape", "data_offsets"}


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY:
        raise _broken(path, f"tensor {_short(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _broken(path, f"tensor {_short(name)} has the unknown dtype {_short(dtype)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {_short(name)} has a shape or offsets that are not whole numbers")
    begin, end = offsets
    if end - begin != -(-math.prod(shape) * BITS[dtype] // 8):
        what = f"tensor {_short(name)} of shape {_short(shape)} and dtype {dtype}"
        raise _broken(path, f"{what} does not fill {end - begin:,} bytes")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _counts(value: Any) -> bool:
    """Whether value is a list of at most 64 counts, as many as torch has dimensions."""
    if not isinstance(value, list) or len(value) > 64 or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < 1 << 63)


def _check_tiling(path: Path, tensors: Mapping[str, TensorInfo], data_size: int) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            fault = "overlaps the one before it" if info.begin < position else "leaves a gap before it"
            raise _broken(path, f"tensor {_short(name)} {fault}")
        if info.end > data_size:
            missing = f"tensor {_short(name)} ends {info.end - data_size:,} bytes after the end of the file"
            raise _broken(path, f"{missing}; it was cut off, or its offsets are wrong")
        position = info.end
    if position != data_size:
        raise _broken(path, f"{data_size - position:,} bytes after its last tensor belong to none")


def _short(value: Any) -> str:
    """A value from the file as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def _broken(path: Path, reason: str) -> BadInput:
    return BadInput(f"{path} is not a valid safetensors file: {reason}.", "Download or copy it again.")
