"""Settings: given, recommended, default; and the plan."""

import math
import re
from pathlib import Path

import pytest

from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase.map_plan import plan
from trce_cli.erase.prior import Prior
from trce_cli.erase.settings import MapSettings, choose_map_settings
from trce_cli.errors import BadInput
from trce_cli.families.base import Family
from trce_cli.families.registry import FAMILIES
from trce_cli.families.slots import slot_weights
from trce_cli.prompts.pairs import PromptPair
from trce_cli.prompts.presets import load_preset
from trce_cli.prompts.settings import MapTable

SD1 = FAMILIES[0]
NOTHING = {"preserve": None, "token_weights": None, "strength": None}


def preset(folder: Path, name: str, table: str, rest: str = "") -> str:
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\ndescription = "d"\nkind = "object"\n{rest}\n'
        f'[[concepts]]\nunsafe = "{name}"\nsafe = "tool"\n[map]\n{table}\n'
    )
    return str(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("preserve", -1.0), ("preserve", math.nan), ("strength", math.inf), ("token_weights", (0, 1, -1, 0))],
)
def test_numbers_must_be_finite_and_not_negative(name: str, value: object) -> None:
    with pytest.raises(BadInput, match=name):
        MapSettings.of({name: value})


@pytest.mark.parametrize("weights", [(0, 0, 0, 0), (), {}, {"SOT": 0}, "1,2", (True, 1, 0, 0)])
def test_token_weights_are_numbers_and_not_all_zero(weights: object) -> None:
    with pytest.raises(BadInput, match="token_weights"):
        MapSettings.of({"token_weights": weights})


@pytest.mark.parametrize("weights", [(1, 2, 3), {"FIRST": 1}])
def test_token_weights_are_for_the_slots_of_the_family(weights: object) -> None:
    with pytest.raises(BadInput, match="SOT, FIRST_EOT, LAST_EOT, KEYWORD"):
        choose_map_settings({"token_weights": weights}, [], SD1)


def test_token_weights_by_name_are_those_in_order() -> None:
    settings, _ = choose_map_settings({"token_weights": {"KEYWORD": 0.5, "FIRST_EOT": 1}}, [], SD1)
    assert settings.token_weights == (0, 1, 0, 0.5)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_the_help_names_the_lambda_that_a_family_is_mapped_with(family: Family) -> None:
    told = (MapTable.model_fields["preserve"].description or "").format(default=MapTable().preserve)
    used = choose_map_settings({}, [], family)[0].preserve
    assert re.search(rf"\b{used:g}[ .]", told.partition("which is")[2])


def test_given_beats_recommended_beats_default(tmp_path: Path) -> None:
    presets = [load_preset(preset(tmp_path, "a", "preserve = 3\nstrength = 0.5"))]
    settings, remarks = choose_map_settings(NOTHING | {"strength": 2.0}, presets, SD1)
    assert settings == MapSettings(preserve=3.0, token_weights=(0, 1, 0, 0), strength=2.0)
    assert remarks == []


def test_presets_that_differ_are_told(tmp_path: Path) -> None:
    first = preset(tmp_path, "a", "preserve = 3\nstrength = 1")
    second = preset(tmp_path, "b", "preserve = 5.5\nstrength = 1.0", 'includes = ["a.toml"]')
    presets = [load_preset(first), load_preset(second)]
    settings, (remark,) = choose_map_settings(NOTHING, presets, SD1)
    assert settings.preserve == 3
    assert all(part in remark for part in ("3.0 by a", "5.5 by b", "3.0 is used", "--preserve"))
    assert choose_map_settings(NOTHING | {"preserve": 1.0}, presets, SD1)[1] == []


def test_plan_names_the_pooled_layer_where_it_is_mapped(tiny_sdxl: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sdxl))
    pairs, prior = [PromptPair("a gun", "a tool", "a gun")], Prior("x", ("c",), ("d",))
    mapped, spared = (
        plan(checkpoint, tmp_path / "out", pairs, prior, MapSettings(without=without))["layers"]
        for without in ((), ("pooled",))
    )
    assert mapped.keys() - spared.keys() == {"add_embedding.linear_1.weight"}


def test_plan_counts_layers_prompts_memory_and_disk(tiny_sd1: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_sd1))
    pairs = [PromptPair("a gun", "a tool", "a gun"), PromptPair("a rifle", "a tool", "a rifle")]
    planned = plan(checkpoint, tmp_path / "new" / "out", pairs, Prior("x", ("c",) * 3, ("d",)), MapSettings())
    assert len(planned["layers"]) == 32
    assert all(shape[1] == 32 for shape in planned["layers"].values())
    assert (planned["pairs"], planned["distinct_prompts"], planned["captions"]) == (2, 3, 3)
    files = [path for path in tiny_sd1.rglob("*") if path.is_file()]
    assert planned["disk_bytes"] == sum(path.stat().st_size for path in files)
    assert 250e6 < planned["memory_bytes"] < 600e6


def test_advice_for_other_slots_is_left_aside_whole(tmp_path: Path) -> None:
    """Lambda and strength were chosen with the slots that they stand beside."""
    chosen = [
        load_preset(preset(tmp_path, "a", "preserve = 3\nstrength = 0.5\ntoken_weights = [0, 1, 0, 1]"))
    ]
    assert choose_map_settings({}, chosen, SD1)[0].strength == 0.5
    z_image = next(family for family in FAMILIES if family.name == "Z-Image")
    settings, remarks = choose_map_settings({}, chosen, z_image)
    assert (settings.preserve, settings.strength) == (z_image.defaults.preserve, 1.0)
    assert settings.token_weights == tuple(slot_weights(z_image, None).values())
    assert remarks == []
    plain = [load_preset(preset(tmp_path, "b", "preserve = 3"))]
    assert choose_map_settings({}, plain, z_image)[0].preserve == 3
