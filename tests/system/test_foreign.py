import os
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, FiniteFloat

from trce_cli.errors import BadInput, TrceError
from trce_cli.system.foreign import (
    check_unchanged,
    identities,
    parse_json,
    parse_toml,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
    validated,
)


def test_only_regular_files_are_read_and_only_small_ones(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 33)
    for name in ("pipe", "folder", "dangling", "loop", "absent", "sparse", "/dev/zero", "a\0b"):
        with pytest.raises(BadInput):
            read_bytes(tmp_path / name)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", most=5) == b"12345"
    with pytest.raises(BadInput, match="at most 4"):
        read_bytes(tmp_path / "file", most=4)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_text(tmp_path / "latin")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(BadInput, match="not a JSON object"):
        read_json(tmp_path / "list.json")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[" * 100 + "]" * 100,
        '{"a":' * 100 + "1" + "}" * 100,
        '["\\ud800"]',
        '{"\\udfff": 1}',
        "1" * 5000,
        "1" * 400,
        "-1e301",
    ],
)
def test_json_that_would_break_something_later_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^x cannot be read as JSON: [^\n]{5,130}\.$"):
        parse_json(text, "x")


def test_json_that_checkpoints_hold_is_read() -> None:
    text = '{"lambda_min_clipped": -Infinity, "\U0001f52a": [1e-5], '
    text += '"model_max_length": 1000000000000000019884624838656}'
    assert parse_json(text, "x")["model_max_length"] == int(1e30)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_what_we_wrote_ourselves_holds_numbers_only(number: str) -> None:
    with pytest.raises(BadInput, match=rf"^x cannot be read as JSON: it holds {number}\.$"):
        parse_json(f'{{"a": [1, {number}]}}', "x", strict=True)
    assert parse_json('{"a": [1, 1e-5]}', "x", strict=True) == {"a": [1, 1e-5]}


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: *a",
        "[" * 20_000,
        "a: [",
        'a: "\\ud800"',
        "a: 2020-13-45",
        "? [a]\n: b",
        "a: 1" + "0" * 400,
        "!!python/object:os.system x",
    ],
)
def test_yaml_that_would_break_something_later_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^x cannot be read as YAML: .{5,130}\.$"):
        parse_yaml(text, "x")


@pytest.mark.parametrize("text", ["a =", "a = " + "[" * 5000, "a." * 500 + "b = 1", "a = 1" + "0" * 400])
def test_toml_that_would_break_something_later_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^x is not valid TOML: .{5,130}\.$"):
        parse_toml(text, "x")


def test_a_model_says_which_key_is_wrong() -> None:
    class Size(BaseModel):
        width: int = Field(gt=0, le=100)

    class Sizes(BaseModel):
        size: Annotated[int, Field(le=9)] | list[Annotated[int, Field(le=9)]]

    assert validated(Size, {"width": 3}, "x").width == 3
    with pytest.raises(BadInput, match=r"^x cannot be read: width must be at most 100, not 1000000000\.$"):
        validated(Size, {"width": 10**9}, "x")
    with pytest.raises(BadInput, match=r"^x cannot be read: it must be a table, not \[\]\.$"):
        validated(Size, [], "x")
    with pytest.raises(BadInput, match=r"^x cannot be read: size must be at most 9, not 10\.$"):
        validated(Sizes, {"size": 10}, "x")
    with pytest.raises(BadInput, match=r"^x cannot be read: width is missing\.$"):
        validated(Size, {}, "x")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (str, 1), (int, "x"), (int, 1.5), (float, []), (bool, 3), (list[int], {}), (dict[str, int], 0),
        (Literal["a", "b"], "c"), (tuple[int, int], [1]), (Annotated[str, Field(max_length=1)], "ab"),
        (Annotated[int, Field(multiple_of=2)], 3), (int | str, []), (None, 1), (FiniteFloat, float("nan")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words_of_ours(kind: Any, value: Any) -> None:
    with pytest.raises(BadInput, match=r"^x cannot be read: \S+ (must|is) ") as told:
        validated(kind, value, "x")
    assert "Input should" not in told.value.message


def test_a_file_that_is_swapped_cut_touched_or_removed_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    seen = identities([path])
    check_unchanged(seen)
    os.utime(path, ns=(0, seen[path].mtime_ns + 1))
    with pytest.raises(TrceError, match="was changed"):
        check_unchanged(seen)
    seen = identities([path])
    os.truncate(path, 4)
    os.utime(path, ns=(0, seen[path].mtime_ns))
    with pytest.raises(TrceError, match="was changed"):
        check_unchanged(seen)
    seen = identities([path])
    (tmp_path / "other").write_bytes(b"1234")
    os.utime(tmp_path / "other", ns=(0, seen[path].mtime_ns))
    (tmp_path / "other").replace(path)
    with pytest.raises(TrceError, match="was changed"):
        check_unchanged(seen)
    seen = identities([path])
    path.unlink()
    with pytest.raises(TrceError, match="removed"):
        check_unchanged(seen)
