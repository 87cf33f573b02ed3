"""Hostile input, drawn by Hypothesis: something that is whole, with a few changes."""

import json
from typing import Any

from hypothesis import strategies as st

from fuzz.world import Folder, Hollow, Link, Lying, Pipe

TEXTS = st.one_of(
    st.sampled_from(
        [
            "", " ", "x", "\x1b[31mred\x1b[0m", "\x00", "a\nb", "\ud800", "../../neighbours/notes.txt",
            "/etc/passwd", "/dev/zero", "~", "NaN", "1e999", "-1", "{}", "{0.__class__}", "%s", "x" * 5000,
            "\u202e\u200b\ufeff", "'; --", "<b>x</b>", "[bold]x[/bold]", "emoji", "None", "true", "é" * 300,
            "tokenizer", "auto", "float64", "CLIPTextModelWithProjection", "..", "C:\\x", "con", "🗡" * 50,
        ]
    ),
    st.text(max_size=12),
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from(
        [
            0, 1, -1, 2, 3, 7, 64, 77, 2**16, 10**6, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**12,
            10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e18, 1e300, 1e308, float("nan"), float("inf"),
            -float("inf"),
        ]
    ),
    st.integers(-10, 2000),
    st.floats(),
)  # fmt: skip
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8) | TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
)
# What is no text of its format, or too much of it.
BLOBS = st.one_of(
    st.sampled_from(
        [
            b"", b" ", b"{", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"\xff\xfe",
            b"\xef\xbb\xbf{}",
            b"1" * 5000, b"nan", b"\x80\x02}q\x00.", b"PK\x03\x04", b"[]", b"null", b'"x"',
            b"{}" + b" " * 100_000,
            b"[" + b"1," * 100_000 + b"1]", b'{"a": 1, "a": 2}', b"\x00" * 64, b"-" * 3000, b"a: &a [*a, *a]",
            b"\x1b[2J" * 10, b"a = " + b"[" * 3000, b"version https://git-lfs.github.com/spec/v1\n",
        ]
    ),
    st.binary(max_size=200),
)  # fmt: skip
# What may lie where a file should.
ODD = st.sampled_from(
    [
        None, Pipe(), Folder(), Hollow(1 << 33), Link("../neighbours/notes.txt"), Link("/dev/zero"),
        Link("../neighbours/folder"), Link("nowhere"), Link("../../../neighbours/notes.txt"),
        Link("/dev/full"),
        Link("/proc/self/mem"), Link("."),
    ]
)  # fmt: skip


def rarely(draw: st.DrawFn, often: int = 12) -> bool:
    """Once in so many times."""
    return draw(st.integers(1, often)) == often


@st.composite
def lying(draw: st.DrawFn, content: st.SearchStrategy[bytes]) -> Lying:
    """The content as a file, and now and then something else in its place."""
    return draw(ODD) if rarely(draw) else draw(content)


@st.composite
def mangled(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut, doubled, replaced or put in between."""
    if rarely(draw, 8):
        return draw(BLOBS)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.sampled_from([0, 1, 1, 2, 8, 64, 10**9])))
        inserted = draw(st.one_of(st.just(b""), st.binary(min_size=1, max_size=4), BLOBS))
        content = content[:at] + inserted + content[end:]
    return content


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three changes: one replaced, taken out, renamed, added or wrapped."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = list(_places(value))
        if not places:
            return draw(VALUES)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(["replace", "replace", "near", "delete", "rename", "add", "wrap"])):
            case "replace":
                holder[key] = draw(VALUES)
            case "near":
                holder[key] = draw(_near(holder[key]))
            case "delete":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[draw(TEXTS)] = holder.pop(key)
            case "add" if isinstance(holder, dict):
                holder[draw(TEXTS)] = draw(VALUES)
            case _:
                holder[key] = [holder[key]] * draw(st.sampled_from([1, 2, 40]))
    return value


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Another value of the same type."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int | float):
        return NUMBERS
    if isinstance(value, str):
        return TEXTS
    if isinstance(value, list):
        return st.sampled_from([[], value[:1], value * 2, value[::-1], [value]])
    return VALUES


def _places(value: Any) -> Any:
    """Every place of a value that can be changed, as its holder and key."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in list(inner):
        yield value, key
        yield from _places(one)


@st.composite
def json_text(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON text of a changed value, now and then damaged as a text."""
    text = json.dumps(draw(changed(value)), ensure_ascii=draw(st.booleans()))
    content = text.encode("utf-8", "surrogatepass")
    return draw(mangled(content)) if rarely(draw, 6) else content


def toml(value: Any) -> str:
    """A value as TOML has it, or something like it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


@st.composite
def lines(draw: st.DrawFn, text: str, mark: str, spelt: Any) -> bytes:
    """A text of `key MARK value` lines with a few of them changed, taken out, moved or doubled."""
    found = text.split("\n")
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(found) - 1))
        key = found[at].partition(mark)[0]
        match draw(st.sampled_from(["value", "value", "value", "key", "delete", "double", "move", "add"])):
            case "value":
                value = draw(VALUES if draw(st.booleans()) else TEXTS if '"' in found[at] else NUMBERS)
                found[at] = f"{key}{mark}{spelt(value)}"
            case "key":
                found[at] = f"{draw(TEXTS)}{mark}{found[at].partition(mark)[2]}"
            case "delete":
                del found[at : at + draw(st.sampled_from([1, 2, 100]))]
                found = found or [""]
            case "double":
                found[at:at] = [found[at]] * draw(st.sampled_from([1, 5000]))
            case "move":
                found.append(found.pop(at))
            case _:
                found.insert(at, f"{draw(TEXTS)}{mark}{spelt(draw(VALUES))}")
    content = "\n".join(found).encode("utf-8", "surrogatepass")
    return draw(mangled(content)) if rarely(draw, 6) else content


Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, data


def tensors_of(content: bytes) -> tuple[Tensors, dict[str, str]]:
    """What a safetensors file holds, and its metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    data = content[8 + length :]
    return {
        name: (one["dtype"], one["shape"], data[slice(*one["data_offsets"])]) for name, one in header.items()
    }, metadata


def safetensors(tensors: Tensors, metadata: Any) -> bytes:
    """A file of these tensors."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position, data = 0, []
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(content)]}
        position += len(content)
        data.append(content)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + b"".join(data)


WIDTHS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "I32": 4}


@st.composite
def other_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file that is well-formed, with other tensors or metadata than it should have."""
    tensors, metadata = tensors_of(content)
    told: Any = metadata
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        names = list(tensors)
        if not names:
            break
        name = names[draw(st.integers(0, len(names) - 1))]
        dtype, shape, data = tensors[name]
        match draw(
            st.sampled_from(["drop", "rename", "shape", "dtype", "values", "add", "metadata", "many"])
        ):
            case "drop":
                del tensors[name]
            case "rename":
                tensors[draw(TEXTS | st.sampled_from(names).map(lambda one: one + ".x"))] = tensors.pop(name)
            case "shape":
                other = draw(
                    st.sampled_from(
                        [
                            [],
                            [0],
                            [1],
                            [1, 1],
                            shape[::-1],
                            shape[:-1],
                            [*shape, 1],
                            [1, *shape],
                            [*shape, 2],
                            [0, 7],
                        ]
                    )
                )
                size = WIDTHS.get(dtype, 4)
                for side in other:
                    size *= side
                tensors[name] = dtype, other, (data * 3)[:size].ljust(size, b"\0")
            case "dtype":
                other = draw(st.sampled_from(list(WIDTHS)))
                size = len(data) // WIDTHS.get(dtype, 4) * WIDTHS[other]
                tensors[name] = other, shape, (data * 8)[:size].ljust(size, b"\0")
            case "values":
                value = draw(st.sampled_from([b"\xff", b"\x00", b"\x7f", b"\x7c"]))
                tensors[name] = dtype, shape, value * len(data)
            case "add":
                size = draw(st.sampled_from([0, 1, 5]))
                tensors[draw(TEXTS)] = "F32", [size], b"\0" * 4 * size
            case "metadata":
                told = draw(changed(told)) if told else draw(VALUES)
            case _:
                for number in range(3000):
                    tensors[f"{name}.{number}"] = "F32", [], b"\0" * 4
    return safetensors(tensors, told)


@st.composite
def header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with another header, or another length of it than it has."""
    length = int.from_bytes(content[:8], "little")
    head, data = content[8 : 8 + length], content[8 + length :]
    if not rarely(draw, 4):
        head = draw(json_text(json.loads(head)))
    told = len(head)
    if rarely(draw, 4):
        told = draw(st.sampled_from([0, 1, 2, told - 1, told + 1, 2**31, 10**8, 2**63 - 1, 2**64 - 1]))
    if rarely(draw, 4):
        data = draw(mangled(data))
    return (told % 2**64).to_bytes(8, "little") + head + data
