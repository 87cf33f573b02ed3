import json
import os
import re
from pathlib import Path

import pytest

from trce_cli.errors import BadInput
from trce_cli.prompts.presets import (
    every_part,
    load_preset,
    load_presets,
    preset_names,
    presets_folder,
    recommended,
)
from trce_cli.prompts.settings import MapTable, SteerTable

I2P = ["hate", "harassment", "violence", "self-harm", "sexual", "shocking", "illegal-activity"]

HEAD = 'name = "mine"\ndescription = "d"\nkind = "object"\n'
CONCEPT = '[[concepts]]\nunsafe = "a sword"\nsafe = "a stick"\n'


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# --- what is shipped


def test_the_promised_presets_are_shipped():
    assert set(preset_names()) >= {*I2P, "unsafe", "weapons", "drugs", "artist-van-gogh"}


@pytest.mark.parametrize("name", preset_names())
def test_a_shipped_preset_is_complete(name):
    preset = load_preset(name)
    concepts = [concept for part in preset.walk() for concept in part.concepts]
    unsafe = [concept.unsafe for concept in concepts]
    assert preset.name == name
    assert preset.description.isprintable()
    assert len(set(unsafe)) == len(unsafe) >= 20
    assert all(len(part.templates) >= 15 for part in preset.walk())
    # Where a phrase is safe for one concept and unsafe for another, the two targets pull against each other.
    assert not set(unsafe) & {concept.safe for concept in concepts}


def test_unsafe_includes_the_seven_families():
    assert [part.name for part in load_preset("unsafe").walk()] == ["unsafe", *I2P]


# Words of concepts that say nothing of what is unsafe in them.
NEUTRAL = """
a an the of in on at by to with for as is from and or his her their other another which that who not
up off out into over above under another's person people man woman someone
"""


def words(texts):
    return {word for text in texts for word in re.findall(r"[^\W\d_]+", text.casefold())}


@pytest.mark.parametrize("name", [name for name in preset_names() if not name.startswith("emoji-")])
def test_shipped_implied_prompts_use_no_word_of_the_concepts(name):
    for part in load_preset(name).walk():
        if not part.concepts:
            continue
        told = words(concept.unsafe for concept in part.concepts)
        told -= words(concept.safe for concept in part.concepts) | words([NEUTRAL])
        assert len(set(part.implied)) >= 12
        assert {prompt: words([prompt]) & told for prompt in part.implied if words([prompt]) & told} == {}


def test_pictures_of_the_seven_families_are_sensitive():
    assert all(part.sensitive for part in load_preset("unsafe").walk())


# --- what a file may say


def test_a_file_says_all_there_is_to_say(tmp_path):
    path = write(
        tmp_path,
        HEAD + 'templates = ["see {}"]\n' + CONCEPT + "[map]\npreserve = 0\ntoken_weights = [1, 0.5, 0, 2]\n"
        "strength = 0.9\n[steer]\nsteps = 10\nearly_steps = 4\nlr = 1e-4\nmargin = 0\nbatch_size = 2\n",
    )
    preset = load_preset(path)
    assert preset.templates == ("see {}",)
    assert preset.map.preserve == 0
    assert preset.map.token_weights == (1, 0.5, 0, 2)
    assert preset.map.strength == 0.9
    assert (preset.steer.steps, preset.steer.early_steps, preset.steer.lr) == (10, 4, 1e-4)
    assert "epochs" not in preset.steer.given()


def test_implied_prompts_must_not_name_the_concept(tmp_path):
    head = HEAD + 'sensitive = false\nimplied = ["what a {} does", "swordfish"]\n' + CONCEPT
    preset = load_preset(write(tmp_path, head.format("knight")))
    assert preset.implied == ("what a knight does", "swordfish")
    assert preset.sensitive is False
    with pytest.raises(BadInput, match="'what a Sword does' says 'sword'"):
        load_preset(write(tmp_path, head.format("Sword")))


def test_a_file_marked_as_utf8_by_its_editor_is_read(tmp_path):
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + CONCEPT).encode())
    assert load_preset(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["name", "missing"]),
        (HEAD, ["[[concepts]]", "includes"]),
        (HEAD + "concepts = []", ["concepts", "empty"]),
        (HEAD + 'templates = []\nincludes = ["weapons"]', ["templates", "empty"]),
        (HEAD + "includes = []\n" + CONCEPT, ["includes", "empty"]),
        (HEAD + CONCEPT + "colour = 3", ["concepts[0].colour", "unknown", "unsafe, safe"]),
        ("nmae = 1\n" + HEAD + CONCEPT, ["'nmae'", "unknown", "'name'", "kind", "includes"]),
        (HEAD.replace("kind", "kimd") + CONCEPT, ["'kimd'", "unknown", "did you mean 'kind'"]),
        (
            HEAD + CONCEPT + "[map]\nlambda = 1",
            [
                "map.lambda",
                "unknown",
                "preserve, word_share, word_prompts, ridge, token_weights, strength, deflate, compounds, "
                "clip_skip",
            ],
        ),
        (
            HEAD + CONCEPT + "[steer]\nlearning_rate = 1",
            ["steer.learning_rate", "unknown", "lr", "max_steps"],
        ),
        (HEAD.replace("object", "thing") + CONCEPT, ["kind", "object, person, scene, style", "'thing'"]),
        (HEAD.replace('"mine"', "3") + CONCEPT, ["name", "text", "3"]),
        (HEAD.replace('"mine"', '" "') + CONCEPT, ["name", "empty"]),
        (HEAD.replace('"mine"', r'"a\nb"') + CONCEPT, ["name", "one line"]),
        (HEAD + 'concepts = "a sword"', ["concepts", "list", "'a sword'"]),
        (HEAD + 'concepts = ["a sword"]', ["concepts[0]", "table", "'a sword'"]),
        (HEAD + '[[concepts]]\nunsafe = "a sword"', ["concepts[0].safe", "missing"]),
        (HEAD + CONCEPT + '[[concepts]]\nunsafe = 1\nsafe = "x"', ["concepts[1].unsafe", "text", "1"]),
        (HEAD + CONCEPT.replace("a stick", "A sword"), ["concepts[0]", "differ", "a sword"]),
        (HEAD + 'templates = "a {}"\n' + CONCEPT, ["templates", "list"]),
        (HEAD + 'templates = ["a photo"]\n' + CONCEPT, ["templates[0]", "exactly one {}"]),
        (HEAD + 'templates = ["{}", "{} or {}"]\n' + CONCEPT, ["templates[1]", "exactly one {}"]),
        (HEAD + 'templates = ["{0}"]\n' + CONCEPT, ["templates[0]", "exactly one {}"]),
        (HEAD + CONCEPT + "[map]\npreserve = -1", ["map.preserve", "at least 0", "-1"]),
        (HEAD + CONCEPT + '[map]\npreserve = "1"', ["map.preserve", "number", "'1'"]),
        (HEAD + CONCEPT + "[map]\npreserve = true", ["map.preserve", "number", "True"]),
        (HEAD + CONCEPT + "[map]\npreserve = nan", ["map.preserve", "nan"]),
        (HEAD + CONCEPT + "[map]\nstrength = inf", ["map.strength", "finite"]),
        (HEAD + CONCEPT + "[map]\nstrength = 0", ["map.strength", "greater than 0"]),
        (
            HEAD + CONCEPT + "[map]\ntoken_weights = [0, -1, 0, 0]",
            ["map.token_weights", "at least 0", "-1"],
        ),
        (HEAD + CONCEPT + "[map]\ntoken_weights = [0, 0, 0, 0]", ["map.token_weights", "zero"]),
        (HEAD + CONCEPT + "[map]\ntoken_weights = 1", ["map.token_weights", "list", "1"]),
        (HEAD + "map = 3\n" + CONCEPT, ["map", "table", "3"]),
        (HEAD + CONCEPT + "[steer]\nsteps = 2.5", ["steer.steps", "whole number", "2.5"]),
        (HEAD + CONCEPT + "[steer]\nsteps = 0", ["steer.steps", "at least 1"]),
        (HEAD + CONCEPT + "[steer]\nsteps = 5\nearly_steps = 6", ["steer", "early_steps", "6", "5"]),
        (HEAD + CONCEPT + "[steer]\nlr = 0", ["steer.lr", "greater than 0"]),
        (HEAD + "x = [\n", ["not valid TOML"]),
        (HEAD + HEAD + CONCEPT, ["not valid TOML"]),
        ("x = " + "1" * 5000, ["not valid TOML"]),
        ("x = " + "[" * 100_000, ["nested too deeply"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as refusal:
        load_preset(path)
    message = refusal.value.message
    assert str(path) in message
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes((HEAD + "# caf\xe9\n").encode("latin-1") + CONCEPT.encode())
    with pytest.raises(BadInput, match="UTF-8"):
        load_preset(path)


def test_what_is_no_preset_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with (tmp_path / "huge.toml").open("wb") as huge:
        huge.truncate(1 << 31)
    for name, word in {"": "folder", "pipe.toml": "no regular file", "huge.toml": "bytes"}.items():
        with pytest.raises(BadInput, match=word):
            load_preset(tmp_path / name)


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(BadInput) as refusal:
        load_preset("wepons")
    assert "'wepons'" in refusal.value.message
    assert "weapons" in refusal.value.hint
    assert "self-harm" in refusal.value.hint


def test_a_checkpoint_in_place_of_a_preset_is_told_its_place():
    with pytest.raises(BadInput) as refusal:
        load_preset("emoji")
    assert refusal.value.hint.startswith("emoji is a checkpoint, which stands first")


@pytest.mark.parametrize("name", ["missing.toml", "some/where", "", "../x"])
def test_a_missing_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="There is no preset"):
        load_preset(name)


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_preset(tmp_path, monkeypatch):
    (tmp_path / "weapons").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_preset("weapons").name == "weapons"


# --- includes


def test_includes_are_names_or_paths_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", HEAD.replace("mine", "other") + CONCEPT, "other.toml")
    path = write(tmp_path, HEAD + 'includes = ["sub/other.toml", "weapons"]\n')
    monkeypatch.chdir("/")
    assert [part.name for part in load_preset(path).walk()] == ["mine", "other", "weapons"]


def test_includes_in_a_circle_are_refused(tmp_path):
    write(tmp_path, HEAD + 'includes = ["b.toml"]\n', "a.toml")
    write(tmp_path, HEAD + 'includes = ["./a.toml"]\n', "b.toml")
    with pytest.raises(BadInput, match=r"a.toml -> b.toml -> a.toml"):
        load_preset(tmp_path / "a.toml")


def test_a_missing_include_names_the_file_that_asks_for_it(tmp_path):
    path = write(tmp_path, HEAD + 'includes = ["weapon"]\n')
    with pytest.raises(BadInput, match=r"mine.toml: includes: .*'weapon'"):
        load_preset(path)


def test_a_broken_include_is_named(tmp_path):
    broken = write(tmp_path, "x", "broken.toml")
    path = write(tmp_path, HEAD + 'includes = ["broken.toml"]\n')
    with pytest.raises(BadInput, match=str(broken)):
        load_preset(path)


# --- hashes and joint settings


def test_the_hash_follows_what_is_said_and_not_how(tmp_path):
    plain = load_preset(write(tmp_path, HEAD + CONCEPT)).sha256()
    assert load_preset(write(tmp_path, "# a remark\n" + HEAD + "\n\n" + CONCEPT)).sha256() == plain
    assert load_preset(write(tmp_path, HEAD + CONCEPT.replace("stick", "broom"))).sha256() != plain


def test_the_hash_follows_the_includes(tmp_path):
    path = write(tmp_path, HEAD + 'includes = ["other.toml"]\n')
    hashes = set()
    for safe in ("a stick", "a broom"):
        write(tmp_path, HEAD + CONCEPT.replace("a stick", safe), "other.toml")
        hashes.add(load_preset(path).sha256())
    assert len(hashes) == 2


def test_joint_settings_are_those_of_the_first_preset_that_names_them(tmp_path):
    first = write(tmp_path, HEAD + CONCEPT + "[map]\npreserve = 0\n[steer]\nlr = 0.1\n", "1.toml")
    second = write(tmp_path, HEAD + CONCEPT + "[map]\npreserve = 2\nstrength = 0.5\n", "2.toml")
    presets = load_presets([first, second, first])
    assert len(presets) == 2
    assert recommended(every_part(presets), "map") == {"preserve": 0, "strength": 0.5}
    assert recommended(every_part(presets), "steer") == {"lr": 0.1}


# --- the commands


def test_list_names_every_shipped_preset(trce):
    told = trce("presets", "list")
    machine = json.loads(trce("presets", "list", "--json").out)
    assert told.status == 0
    assert all(name in told.out for name in preset_names())
    assert [row["name"] for row in machine["presets"]] == preset_names()


def test_show_takes_names_and_files(trce):
    by_name = trce("presets", "show", "weapons")
    by_path = trce("presets", "show", presets_folder() / "weapons.toml")
    assert by_name.out == by_path.out
    assert "a walking stick" in by_name.out


def test_show_tells_the_settings_that_hold_when_includes_bring_them(trce):
    told = json.loads(trce("presets", "show", "unsafe", "--json").out)
    assert told["map"] == {"token_weights": [0, 1, 0, 0]}
    assert told["steer"]["lr"] == 1e-6
    assert len(told["concepts"]) >= 7 * 20


def test_show_pairs_tells_what_map_would_use(trce):
    pairs = json.loads(trce("presets", "show", "weapons", "--pairs", "--json").out)
    assert {
        "unsafe": "a photo of a sword",
        "safe": "a photo of a walking stick",
        "keyword": "a sword",
    } in pairs
    assert all(list(pair) == ["unsafe", "safe", "keyword"] for pair in pairs)
    assert "a photo of a walking stick" in trce("presets", "show", "weapons", "--pairs").out


def test_check_accepts_and_refuses(trce, tmp_path):
    good, bad = write(tmp_path, HEAD + CONCEPT), write(tmp_path, HEAD, "bad.toml")
    assert trce("presets", "check", good).status == 0
    assert json.loads(trce("presets", "check", good, "--json").out)["valid"] is True
    refused = trce("presets", "check", bad, "--json")
    assert refused.status == 2
    assert str(bad) in refused.err
    assert str(bad) in json.loads(refused.out)["error"]["message"]


def test_new_writes_a_valid_commented_preset_once(trce, tmp_path):
    path = tmp_path / "mine.toml"
    assert trce("presets", "new", path).status == 0
    assert trce("presets", "check", path).status == 0
    assert "# " in path.read_text()
    assert load_preset(path).name == "mine"
    path.write_text("kept")
    assert trce("presets", "new", path).status == 2
    assert path.read_text() == "kept"
    assert trce("presets", "new", path, "--force", "--json").status == 0
    assert os.listdir(tmp_path) == ["mine.toml"]


def test_the_settings_that_new_explains_are_valid(trce, tmp_path):
    path = tmp_path / "mine.toml"
    trce("presets", "new", path)
    settled = [
        line.removeprefix("# ") if " = " in line and line.startswith("# ") else line
        for line in path.read_text().splitlines()
    ]
    path.write_text("\n".join(settled))
    preset = load_preset(path)
    assert preset.map.model_fields_set == set(MapTable.model_fields)
    assert preset.steer.model_fields_set == set(SteerTable.model_fields)


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "ünï"])
def test_new_makes_a_valid_name_of_any_file_name(trce, tmp_path, name):
    path = tmp_path / f"{name}.toml"
    assert trce("presets", "new", path).status == 0
    assert load_preset(path).name == name


@pytest.mark.parametrize("target", ["", "no/such/folder.toml"])
def test_new_refuses_a_place_where_no_file_can_be(trce, tmp_path, target):
    assert trce("presets", "new", tmp_path / target).status == 2


@pytest.mark.parametrize("command", [["list"], ["show", "weapons"], ["show", "weapons", "--pairs"]])
def test_quiet_lets_the_answer_through(trce, command):
    told, loud = trce("presets", *command, "--quiet"), trce("presets", *command)
    assert (told.status, told.out, told.err) == (0, loud.out, "")
    assert told.out


def test_includes_that_include_twice_are_read_once(tmp_path: Path) -> None:
    for number in range(30):
        includes = f'includes = ["{number + 1}.toml", "{number + 1}.toml"]' if number < 29 else CONCEPT
        (tmp_path / f"{number}.toml").write_text(
            f'name = "{number}"\ndescription = "d"\nkind = "object"\n{includes}\n'
        )
    assert [preset.name for preset in load_preset(tmp_path / "0.toml").walk()] == [str(n) for n in range(30)]


def test_includes_are_not_followed_without_end(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.toml").write_text(
            f'name = "a"\ndescription = "d"\nkind = "object"\nincludes = ["{number + 1}.toml"]\n'
        )
    with pytest.raises(BadInput, match="more than 32 deep"):
        load_preset(tmp_path / "0.toml")
