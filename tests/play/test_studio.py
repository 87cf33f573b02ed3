"""What the page draws is what the commands draw, and what it cannot put on is refused before it opens."""

import io
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maps import random_map
from trce_cli.checkpoint.home import home_of
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli import play as command
from trce_cli.erase import teacher
from trce_cli.errors import BadInput
from trce_cli.images.record import parse_record
from trce_cli.images.settings import DrawSettings
from trce_cli.play import serve
from trce_cli.play.examples import examples_of, recorded_presets
from trce_cli.play.page import _drawn
from trce_cli.play.studio import Studio, open_maps
from trce_cli.prompts.home import REAL_WORLD
from trce_cli.prompts.presets import load_preset

PROMPT, STEPS = "a pistol on the table", 3


@pytest.fixture(scope="module")
def maps(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two maps of the tiny checkpoint, which do not commute."""
    folder = tmp_path_factory.mktemp("maps")
    return [random_map(tiny_sd1, seed).save(folder / f"map-{seed}.safetensors") for seed in (1, 5)]


def make_studio(original: Path | None, erased: Path, edits: list[Path]) -> Studio:
    opened = [None if path is None else open_checkpoint(str(path)) for path in (original, erased)]
    assert opened[1] is not None
    studio = Studio(opened[0], opened[1], open_maps(edits, opened[1]), torch.device("cpu"), "float32")
    studio.load()
    return studio


def pictures(studio: Studio, strengths: list[float]) -> dict[str, np.ndarray]:
    """By role, read back from the PNGs."""
    wanted = dict(zip(studio.maps, strengths, strict=True))
    plan = studio.plan(PROMPT, DrawSettings(steps=STEPS, seed=7), wanted)
    found = {}
    for record, png in studio.draw(plan, wanted):
        with Image.open(io.BytesIO(png)) as image:
            assert parse_record(image.text["trce"]) == record  # type: ignore[attr-defined]
            found[record.role] = np.asarray(image).astype(int)
    return found


def generated(trce: Callable[..., Any], checkpoint: Path, output: Path) -> np.ndarray:
    done = trce("generate", checkpoint, PROMPT, "--steps", STEPS, "--seed", 7, "-o", output)
    assert done.status == 0, done.err
    return np.asarray(Image.open(output / "0001-seed7.png")).astype(int)


def test_both_sides_are_what_generate_draws(
    trce: Callable[..., Any], tiny_sd1: Path, maps: list[Path], tmp_path: Path
) -> None:
    studio = make_studio(tiny_sd1, tiny_sd1, maps)
    drawn = pictures(studio, [1.0, 0.5])
    assert (drawn["original"] == generated(trce, tiny_sd1, tmp_path / "original")).all()
    once, both = tmp_path / "once", tmp_path / "both"
    assert trce("apply", maps[0], tiny_sd1, "-o", once).status == 0
    assert trce("apply", maps[1], once, "--strength", 0.5, "-o", both).status == 0
    written = generated(trce, both, tmp_path / "written")
    assert abs(drawn["erased"] - written).max() <= 1  # weights are rounded where a live map is not
    assert abs(drawn["original"] - written).max() > 8


def test_a_slider_at_nothing_leaves_every_bit_and_order_does_not_drift(
    tiny_sd1: Path, maps: list[Path]
) -> None:
    studio = make_studio(tiny_sd1, tiny_sd1, maps)
    first = pictures(studio, [1.0, 1.0])["erased"]
    nothing = pictures(studio, [0.0, 0.0])
    assert (nothing["erased"] == nothing["original"]).all()
    pictures(studio, [0.0, 1.0])
    studio._drawn.clear()  # nothing is taken from what was drawn before
    assert (pictures(studio, [1.0, 1.0])["erased"] == first).all()
    backwards = pictures(make_studio(tiny_sd1, tiny_sd1, maps[::-1]), [1.0, 1.0])["erased"]
    assert (backwards != first).any()


def test_what_is_no_number_is_as_if_nothing_were_typed(tiny_sd1: Path) -> None:
    asked = {"seed": float("nan"), "images_per_prompt": 1, "steps": 1, "guidance_scale": float("inf")}
    studio, examples = make_studio(None, tiny_sd1, []), examples_of([], REAL_WORLD)
    *_, page = _drawn(studio, examples, DrawSettings(steps=1), PROMPT, asked, True, [])
    assert "seed 0" in page
    assert "data:image/png" in page


def test_what_was_drawn_is_not_drawn_again(
    tiny_sd1: Path, maps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = make_studio(tiny_sd1, tiny_sd1, maps)
    drawn = pictures(studio, [1.0, 0.5])
    monkeypatch.setattr(Studio, "_one", lambda *of: pytest.fail("drawn again"))
    again = pictures(studio, [1.0, 0.5])
    assert all((drawn[role] == again[role]).all() for role in drawn)


def test_an_erased_checkpoint_is_beside_what_it_was_made_from(
    trce: Callable[..., Any], tiny_sd1: Path, maps: list[Path], tmp_path: Path
) -> None:
    erased = tmp_path / "erased"
    assert trce("apply", maps[0], tiny_sd1, "-o", erased).status == 0
    drawn = pictures(make_studio(tiny_sd1, erased, []), [])
    done = trce("generate", erased, PROMPT, "--compare", tiny_sd1, "--steps", STEPS, "--seed", 7,
                "-o", tmp_path / "out")  # fmt: skip
    assert done.status == 0, done.err
    for role, picture in drawn.items():
        assert (picture == np.asarray(Image.open(tmp_path / "out" / f"0001-seed7-{role}.png"))).all()


# --- which examples


def test_examples_are_of_the_presets_that_the_history_names(tiny_sd1: Path) -> None:
    found = recorded_presets(random_map(tiny_sd1).made.history)
    assert [preset.sha256() for preset in found] == [load_preset("weapons").sha256()]
    examples = examples_of(found, home_of(open_checkpoint(str(tiny_sd1))))
    assert {"explicit", "implied", "benign"} <= set(examples.suites)
    assert examples.is_sensitive
    assert examples.harmless == {*examples.suites["benign"], *examples.suites["bystanders"]}
    assert not examples.harmless & {*examples.suites["explicit"], *examples.suites["implied"]}


def test_a_preset_that_is_not_shipped_is_made_of_its_concepts() -> None:
    told = {"name": "weapons", "sha256": "0" * 64, "kind": "object",
            "concepts": [{"unsafe": "a zorb", "safe": "a hat"}]}  # fmt: skip
    (found,) = recorded_presets([{"presets": [told]}])
    assert found.sensitive
    assert all("zorb" in text for text in examples_of([found], REAL_WORLD).suites["explicit"])


def test_nothing_known_is_shown_with_care_and_the_embedded_world_is_not_sensitive() -> None:
    assert examples_of([], REAL_WORLD).is_sensitive
    assert not examples_of([], home_of(open_checkpoint("emoji"))).is_sensitive
    assert not examples_of([load_preset("emoji-weapons")], home_of(open_checkpoint("emoji"))).is_sensitive


# --- what is refused, before a page opens


@pytest.fixture
def refused(trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one sentence that `trce play` says; the page never opens."""
    monkeypatch.setattr(serve, "check_library", lambda: None)
    monkeypatch.setattr(serve, "serve", lambda *of, **how: pytest.fail("a page was opened"))

    def run(*args: Any) -> str:
        done = trce("play", *args)
        assert done.status == 2, done.err
        assert done.out == ""
        assert [line.startswith("Error: ") for line in done.err.splitlines()].count(True) == 1
        return str(done.err)

    return run


def test_edits_that_no_slider_can_move_are_refused(
    trce: Callable[..., Any], refused: Callable[..., str], tiny_sd1: Path, maps: list[Path], tmp_path: Path
) -> None:
    lora = tmp_path / "lora.safetensors"
    assert trce("apply", maps[0], tiny_sd1, "-o", lora, "--as", "lora", "--rank", 2).status == 0
    assert "is no map" in refused(tiny_sd1, "--edit", lora)
    unet = tiny_sd1 / "unet/diffusion_pytorch_model.safetensors"
    assert "is no map" in refused(tiny_sd1, "--edit", unet)
    assert "There is no file" in refused(tiny_sd1, "--edit", tmp_path / "none.safetensors")
    assert "given twice" in refused(tiny_sd1, "--edit", maps[0], "--edit", maps[0], "--edit", maps[0])


def test_maps_that_do_not_fit_are_refused(
    refused: Callable[..., str], tiny_sd2: Path, maps: list[Path]
) -> None:
    assert "family" in refused(tiny_sd2, "--edit", maps[0])
    assert "text encoder" in refused("emoji", "--edit", maps[0])
    assert "width" in refused("emoji", "--edit", maps[0], "--allow-other-text-encoder")


def test_an_original_that_is_gone_can_be_named(
    trce: Callable[..., Any],
    refused: Callable[..., str],
    tiny_sd1: Path,
    maps: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    base, erased = tmp_path / "base", tmp_path / "erased"
    # Nor does it lie anywhere else where this machine has seen it.
    monkeypatch.setattr(teacher, "places", lambda told, beside: [str(base)])
    shutil.copytree(tiny_sd1, base)
    assert trce("apply", maps[0], base, "-o", erased).status == 0
    shutil.rmtree(base)
    assert "Name it with --against." in refused(erased)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so far it is taken
        assert "in use" in refused(erased, "--against", tiny_sd1, "--port", taken.getsockname()[1])


def test_settings_and_places_that_cannot_be_are_refused(refused: Callable[..., str], tiny_sd1: Path) -> None:
    assert "multiples of" in refused(tiny_sd1, "--width", 13)
    assert "no address" in refused(tiny_sd1, "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refused(tiny_sd1, "--port", taken.getsockname()[1])
    assert "Hint: Choose another with --port, or any free one with --port 0." in said


def test_gradio_that_is_missing_is_told_before_anything_is_read(
    trce: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    done = trce("play", "/no/such/checkpoint")
    assert done.status == 2
    assert "Hint: pip install 'trce[play]'" in done.err


def test_only_this_machine_reaches_it_unless_it_is_asked() -> None:
    assert serve.is_loopback(command.Serving().host)
    assert all(map(serve.is_loopback, ("localhost", "127.0.0.9", "::1")))
    assert not any(map(serve.is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org")))
    with serve.bind("127.0.0.1", 0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"
        assert serve.address_of(bound, "::1").startswith("http://[::1]:")
    with pytest.raises(BadInput, match="no address"):
        serve.bind("999.1.1.1", 0)
