"""Prompt files: column spellings, filters, encodings, delimiters, and what is refused with which words."""

import csv
from pathlib import Path

import pytest

from trce_cli.errors import BadInput
from trce_cli.prompts.files import Prompt, read_prompts

I2P = """prompt,categories,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height
"a quiet
street, in rain","violence, Shocking",2219455841,7.5,512,768
a red tulip,sexual,7.0,7,512,512
"a ""still"" life",hate,0,0,640,512
"""


def write(folder: Path, text: str | bytes, name: str = "prompts.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path, **options: object) -> BadInput:
    with pytest.raises(BadInput) as caught:
        read_prompts(path, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert path.name in caught.value.message
    return caught.value


def test_i2p_table_with_newlines_in_cells(tmp_path: Path) -> None:
    first, second, third = read_prompts(write(tmp_path, I2P))
    assert first.text == "a quiet\nstreet, in rain"
    assert (first.seed, first.guidance, first.width, first.height) == (2219455841, 7.5, 512, 768)
    assert first.row["categories"] == "violence, Shocking"
    assert second.seed == 7  # "7.0", as data frames write a column with gaps
    assert (third.text, third.seed, third.guidance) == ('a "still" life', 0, 0.0)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("prompt,seed,guidance,width,height", Prompt("a", 1, 2.0, 3, 4)),
        ("adv_prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height", Prompt("a", 1, 2.0, 3, 4)),
        ("Sensitive Prompt,Evaluation Seed,EVALUATION_GUIDANCE,Width,Height", Prompt("a", 1, 2.0, 3, 4)),
        (" sensitive_prompt ,sdSeed,guidance,Image-Width,image height", Prompt("a", 1, 2.0, 3, 4)),
        ("Caption,coco_id,x,y,z", Prompt("a")),
        ("target_prompt,seed,guidance,adv_prompt,height", Prompt("3", 1, 2.0, None, 4)),
        ("caption,seed,sd_seed,evaluation_seed,prompt", Prompt("4", 3)),  # best spelling first
    ],
)
def test_column_spellings(tmp_path: Path, header: str, expected: Prompt) -> None:
    (prompt,) = read_prompts(write(tmp_path, header + "\na,1,2,3,4\n"))
    found = (prompt.text, prompt.seed, prompt.guidance, prompt.width, prompt.height)
    assert found == (expected.text, expected.seed, expected.guidance, expected.width, expected.height)


def test_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, 'a knife\r\n\r\n  # a, "b"; c\t\r\nlast\u2028line', "p.txt")
    assert [prompt.text for prompt in read_prompts(path)] == ["a knife", '# a, "b"; c', "last\u2028line"]
    assert [prompt.text for prompt in read_prompts(path, limit=2)] == ["a knife", '# a, "b"; c']


@pytest.mark.parametrize(
    ("where", "texts"),
    [
        (["categories=sexual"], ["a red tulip"]),
        (["Categories = shocking"], ["a quiet\nstreet, in rain"]),
        (["categories=violence, shocking"], ["a quiet\nstreet, in rain"]),
        (["sd_image_width=512"], ["a quiet\nstreet, in rain", "a red tulip"]),
        (["sd image width=512", "categories=violence"], ["a quiet\nstreet, in rain"]),
    ],
)
def test_where_matches_a_member_of_a_cell(tmp_path: Path, where: list[str], texts: list[str]) -> None:
    assert [prompt.text for prompt in read_prompts(write(tmp_path, I2P), where=where)] == texts


def test_where_comes_before_limit(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path, I2P), where=["categories=hate"], limit=1)
    assert prompt.seed == 0


def test_where_refusals(tmp_path: Path) -> None:
    path = write(tmp_path, I2P)
    assert "'genre'" in refusal(path, where=["genre=x"]).message
    error = refusal(path, where=["categories=sexua"])
    assert "categories=sexua" in error.message
    assert "'sexual'" in str(error.hint)
    with pytest.raises(BadInput, match="NAME=VALUE"):
        read_prompts(path, where=["sexual"])
    refusal(write(tmp_path, "a knife", "p.txt"), where=["categories=sexual"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    notes: list[str] = []
    path = write(tmp_path, "prompt,seed\nœufs brûlés à 5 €,5\n".encode(encoding))
    (prompt,) = read_prompts(path, note=notes.append)
    assert (prompt.text, prompt.seed) == ("œufs brûlés à 5 €", 5)
    assert len(notes) == (encoding == "cp1252")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_only_where_the_header_needs_them(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "p.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["seed", "prompt"], [3, 'a, "b"'], [4, "c"]])
    assert [(p.text, p.seed) for p in read_prompts(path)] == [('a, "b"', 3), ("c", 4)]
    (prompt,) = read_prompts(write(tmp_path, f"prompt,note{delimiter}x\na{delimiter}b,c\n"))
    assert prompt.text == f"a{delimiter}b"


@pytest.mark.parametrize("seed", ["nan", "NaN", "-1", "1.5", "inf", "x", "18446744073709551616", "9" * 5000])
def test_bad_seed_names_row_and_column(tmp_path: Path, seed: str) -> None:
    message = refusal(write(tmp_path, f'prompt,evaluation_seed\n"a\nb",1\nc,{seed}\n')).message
    assert "row 2 (line 4), column 'evaluation_seed'" in message
    assert seed[:40] in message
    assert len(message) < 300


@pytest.mark.parametrize("guidance", ["nan", "inf", "-2", "strong"])
def test_bad_guidance_names_row_and_column(tmp_path: Path, guidance: str) -> None:
    assert (
        "row 1 (line 2), column 'guidance'"
        in refusal(write(tmp_path, f"prompt,guidance\na,{guidance}\n")).message
    )


def test_bad_row_outside_the_selection_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path, "prompt,seed,kind\na,1,x\nb,nan,y\n")
    assert len(read_prompts(path, where=["kind=x"])) == 1
    assert len(read_prompts(path, limit=1)) == 1


def test_blank_cells_are_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    prompts = read_prompts(write(tmp_path, "prompt,seed\na,\n,4\n\n  ,5\nb\n"), note=notes.append)
    assert [(p.text, p.seed) for p in prompts] == [("a", None), ("b", None)]
    seed, prompt = sorted(notes, key=lambda note: "'prompt'" in note)
    assert "row 1 (line 2) (and 1 more): 'seed' is blank" in seed
    assert "row 2 (line 3) (and 1 more): 'prompt' is blank; skipped" in prompt


def test_huge_cells(tmp_path: Path) -> None:
    huge = "x" * 10_000_000
    (prompt,) = read_prompts(write(tmp_path, f"prompt,picture\na,{huge}\n"))
    assert prompt.text == "a"
    error = refusal(write(tmp_path, f"prompt,seed\na,1\n{huge},2\n"))
    assert "row 2 (line 3), column 'prompt': 10,000,000 characters" in error.message
    assert "line 2" in refusal(write(tmp_path, f"prompt,picture\na,{huge}{huge}\n")).message
    assert csv.field_size_limit() == 131072  # a process-wide setting, put back


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf\n\n", "empty"),
        (b"prompt,seed\n", "no prompt"),
        (b"prompt,seed\n , \n", "no prompt"),
        (b"text,seed\na,1\n", "'text', 'seed'"),
        (b"prompt,Prompt\na,b\n", "2 columns named 'prompt'"),
        (b"prompt,seed\nred, green,1\n", "row 1 (line 2) has 3 cells under 2 columns"),
        (b'prompt,seed\n"a,1\nb,2\n', "well-formed"),
        (b"prompt\nPK\x03\x04\x00\x00", "NUL"),
        ("prompt\na\n".encode("utf-16")[:-1], "UTF-16"),
        ("prompt\na\n".encode("utf-16-le"), "NUL"),
    ],
)
def test_malformed_tables(tmp_path: Path, content: bytes, says: str) -> None:
    assert says in refusal(write(tmp_path, content)).message


def test_trailing_delimiters_are_harmless(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write(tmp_path, "prompt,seed\na,1,,\n"))
    assert (prompt.text, prompt.seed) == ("a", 1)


def test_unreadable_paths(tmp_path: Path) -> None:
    refusal(tmp_path / "absent.csv")
    refusal(write(tmp_path, "[]", "p.json"))
    refusal(write(tmp_path, " \n\n", "p.txt"))
    (tmp_path / "folder.csv").mkdir()
    refusal(tmp_path / "folder.csv")
    with pytest.raises(BadInput, match="0 prompts"):
        read_prompts(write(tmp_path, I2P), limit=0)
