"""Images on disk: text chunks, whole files, resuming a folder, and the grid."""

import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from trce_cli.errors import BadInput
from trce_cli.images.folder import ImageFolder
from trce_cli.images.font import legible, typeface
from trce_cli.images.grid import draw_grid, wrap, write_grid
from trce_cli.images.record import ImageRecord, parameters, read_image, write_image
from trce_cli.system.machine import __version__

RECORD = ImageRecord(
    file="0001-seed42.png",
    index=1,
    role="image",
    prompt="a café,\nin the rain",
    seed=42,
    steps=25,
    guidance_scale=7.5,
    scheduler="euler-a",
    width=16,
    height=24,
    dtype="float32",
    checkpoint="some/where/model, v1",
    checkpoint_sha256="0123456789abcdef" * 4,
    negative_prompt="fog 雾",
    row={"categories": "hate, violence"},
)
OTHER = replace(RECORD, file="0002-seed7.png", index=2, seed=7)


def picture(colour: str = "red", size: tuple[int, int] = (16, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def lines(folder: Path) -> list[str]:
    return [json.loads(line)["file"] for line in (folder / "images.jsonl").read_text("utf-8").splitlines()]


def test_parameters_are_in_the_web_uis_form() -> None:
    assert parameters(RECORD) == (
        "a café,\nin the rain\nNegative prompt: fog 雾\n"
        "Steps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 16x24, "
        f"Model hash: 0123456789, Model: model_ v1, Version: trce {__version__}"
    )
    assert "Negative" not in parameters(replace(RECORD, negative_prompt=""))


def test_png_carries_its_record(tmp_path: Path) -> None:
    write_image(tmp_path, picture(), RECORD)
    with Image.open(tmp_path / RECORD.file) as image:
        assert image.text["parameters"] == parameters(RECORD)  # type: ignore[attr-defined]
        assert json.loads(image.text["trce"]) == asdict(RECORD)  # type: ignore[attr-defined]
    assert read_image(tmp_path / RECORD.file) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [RECORD.file]


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path, picture(), RECORD)
    assert not list(tmp_path.iterdir())


def test_folder_resumes_with_what_is_missing(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "deep" / "out", [RECORD, OTHER])
    assert folder.missing == [RECORD, OTHER]
    folder.add(OTHER, picture())
    assert lines(folder.path) == [OTHER.file]
    again = ImageFolder(folder.path, [RECORD, OTHER])
    assert again.missing == [RECORD]
    again.add(RECORD, picture())
    again.write_index()
    assert lines(folder.path) == [RECORD.file, OTHER.file]
    assert not ImageFolder(folder.path, [RECORD, OTHER]).missing


def test_torn_index_and_torn_png_are_put_right(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, [RECORD, OTHER])
    folder.add(RECORD, picture())
    folder.add(OTHER, picture())
    index = tmp_path / "images.jsonl"
    index.write_text(index.read_text("utf-8")[:-30], "utf-8")
    data = (tmp_path / OTHER.file).read_bytes()
    (tmp_path / OTHER.file).write_bytes(data[: len(data) - 20])
    again = ImageFolder(tmp_path, [RECORD, OTHER])
    assert again.missing == [OTHER]
    assert lines(tmp_path) == [RECORD.file]
    again.add(OTHER, picture())
    assert read_image(tmp_path / OTHER.file) == OTHER


@pytest.mark.parametrize("refused", ["open", "read"])
def test_a_picture_that_the_system_does_not_let_read_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    ImageFolder(tmp_path, [RECORD]).add(RECORD, picture())

    def refuse(*args: object, **named: object) -> None:
        raise OSError(errno.EMFILE if refused == "open" else errno.EIO, "Refused")

    monkeypatch.setattr(*((os, "open") if refused == "open" else (Image, "open")), refuse)
    with pytest.raises((BadInput, OSError), match="Refused"):
        ImageFolder(tmp_path, [RECORD])


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 50), ("checkpoint_sha256", "f" * 64), ("prompt", "a tulip"), ("dtype", "float16")],
)
def test_images_with_other_settings_are_refused(tmp_path: Path, field: str, value: object) -> None:
    ImageFolder(tmp_path, [RECORD]).add(RECORD, picture())
    changed = replace(RECORD, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(BadInput) as caught:
        ImageFolder(tmp_path, [changed])
    assert str(value) in caught.value.message
    assert "--force" in str(caught.value.hint)
    assert lines(tmp_path) == [RECORD.file]
    assert ImageFolder(tmp_path, [changed], force=True).missing == [changed]


def test_images_of_another_run_are_refused_or_removed(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, [RECORD, OTHER])
    folder.add(RECORD, picture())
    folder.add(OTHER, picture())
    (tmp_path / "notes.png").write_bytes(b"mine")
    with (tmp_path / "images.jsonl").open(
        "a"
    ) as index:  # a name that leads out of the folder is no image of it
        index.write(json.dumps(asdict(replace(RECORD, file="../outside.png"))) + "\n")
    with pytest.raises(BadInput, match=OTHER.file):
        ImageFolder(tmp_path, [RECORD])
    assert not ImageFolder(tmp_path, [RECORD], force=True).missing
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD.file, "images.jsonl", "notes.png"]


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    picture().save(tmp_path / RECORD.file)
    with pytest.raises(BadInput, match="by something else"):
        ImageFolder(tmp_path, [RECORD])
    (tmp_path / "mine").mkdir()
    picture().save(tmp_path / "mine" / "grid.png")
    with pytest.raises(BadInput, match=r"grid\.png"):
        ImageFolder(tmp_path / "mine", [RECORD])
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="no folder"):
        ImageFolder(tmp_path / "file", [RECORD])


def test_labels_are_wrapped_within_their_width() -> None:
    font = typeface(16)
    text = "a long prompt about a harbour " * 6 + "w" * 200
    wrapped = wrap(text, font, 200, 40)
    assert all(font.getlength(line) <= 200 for line in wrapped)
    assert "".join(wrapped).replace(" ", "") == text.replace(" ", "")
    cut = wrap(text, font, 200, 3)
    assert len(cut) == 3
    assert cut[2].endswith("...")
    assert wrap("short", font, 200, 3) == ["short"]


def test_accents_are_drawn_and_emoji_are_named() -> None:
    missing = typeface(16).getmask("\U0001f600").getbbox(), bytes(typeface(16).getmask("\U0001f600"))
    for letter in "éèüßłžñçøåİğΩжЯ—“”…€":
        drawn = typeface(16).getmask(letter)
        assert (drawn.getbbox(), bytes(drawn)) != missing, letter
    assert legible("Küche\N{COMBINING DIAERESIS}ntisch") == "Küchëntisch"
    assert legible("a 🐱 and a ❤️") == "a (cat face) and a (heavy black heart)"
    assert legible("plain, 100 % ascii") == "plain, 100 % ascii"


def test_grid_shows_every_image_under_its_column() -> None:
    small, wide = (picture("red", (64, 64)), picture("blue", (64, 64))), (picture("lime", (600, 300)),) * 2
    grid = draw_grid([("a knife", "seed 1", small), ("x" * 500, "seed 2", wide)], ["original", "erased"])
    colours = {colour: count for count, colour in grid.getcolors(1 << 20) or []}
    assert colours[(255, 0, 0)] == colours[(0, 0, 255)] == 256 * 256  # enlarged by a whole factor
    assert colours[(0, 255, 0)] == 2 * 256 * 128
    right_half = grid.crop((grid.width - 256 - 12, 0, grid.width, grid.height))
    assert {(0, 0, 255), (0, 255, 0)} < {colour for _, colour in right_half.getcolors(1 << 20) or []}
    assert (255, 0, 0) not in {colour for _, colour in right_half.getcolors(1 << 20) or []}


def test_grid_file_has_a_row_a_prompt_and_seed(tmp_path: Path) -> None:
    records = [
        replace(RECORD, file=f"{seed}-{role}.png", seed=seed, role=role)
        for seed in (1, 2)
        for role in ("original", "erased")
    ]
    for record in records:
        write_image(tmp_path, picture("red" if record.role == "original" else "blue"), record)
    with Image.open(write_grid(tmp_path, records)) as grid:
        left, right = (grid.crop(box) for box in ((280, 0, 280 + 170, 700), (280 + 170, 0, 900, 700)))
        red, blue = ((255, 0, 0), 160 * 240), ((0, 0, 255), 160 * 240)  # 16x24 enlarged ten times
        for half, (colour, area) in ((left, red), (right, blue)):
            assert {c: n for n, c in half.getcolors(1 << 20) or []}[colour] == 2 * area
