"""The kinds of input that come from strangers: how each is drawn, and the commands that read it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from hypothesis import strategies as st

from fuzz.strategies import (
    NUMBERS,
    TEXTS,
    VALUES,
    changed,
    header,
    json_text,
    lines,
    lying,
    mangled,
    other_tensors,
    rarely,
    safetensors,
    tensors_of,
    toml,
)
from fuzz.world import CARD, PRESET, PROMPTS, STEER, Lying


@dataclass(frozen=True)
class Case:
    """A command line, and what lies in its way in place of what is whole.

    anywhere: whether what it writes may lie beside `out/`, as the line may say so.
    """

    args: list[str]
    files: Mapping[str, Lying] = field(default_factory=dict)
    anywhere: bool = False


Whole = Mapping[str, bytes]
Draw = Callable[[st.DrawFn, Whole], Case]
KINDS: Final[dict[str, Draw]] = {}


def kind(name: str) -> Callable[[Draw], Draw]:
    """Register how the cases of a kind are drawn from what is whole."""

    def add(draw: Draw) -> Draw:
        KINDS[name] = draw
        return draw

    return add


def cases(name: str, whole: Whole) -> st.SearchStrategy[Case]:
    """The cases of a kind."""

    @st.composite
    def case(draw: st.DrawFn) -> Case:
        return KINDS[name](draw, whole)

    return case()


MAP: Final = ["map", "sd1", "--device", "cpu"]
DRAWN: Final = ["--steps", "1", "--device", "cpu", "--width", "16", "--height", "16"]
OUT: Final = ["-o", "out/x"]
EDITS: Final = {"sd1": "map.safetensors", "sdxl": "map-xl.safetensors", "z": "map-z.safetensors"}


def _read(whole: Whole, name: str) -> Any:
    return json.loads(whole[name])


PHRASES = st.one_of(
    st.sampled_from(
        [
            "a knife", "a cat", "A Cat", "the gun", "knife", "x" * 300, "e\u0301", "\u0645\u0633\u062f\u0633",
            "a 🗡 b",
            "a 'b' \"c\"", "#", "a\\b", "a, b", "a {b}", "((a:1.3))", "[bold]", "<|endoftext|>", "100 %",
            "ß", "İ",
        ]
    ),
    st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20),
)  # fmt: skip
SHARES = st.one_of(st.sampled_from([0, 1, 0.5, 1e-6, 1e-300]), st.floats(0, 1))
SIZES = st.one_of(st.sampled_from([0, 1, 0.1, 1e-9, 1e9, 1e30]), st.floats(0, 100))
COUNTS = st.integers(1, 20)


@st.composite
def sound_presets(draw: st.DrawFn) -> dict[str, Any]:
    """The tables of a preset in which hardly anything is wrong."""
    framed = st.tuples(PHRASES, PHRASES).map(" {} ".join)
    needed = {
        "name": PHRASES,
        "description": PHRASES,
        "kind": st.sampled_from(["object", "person", "scene", "style"]),
        "concepts": st.lists(
            st.fixed_dictionaries({"unsafe": PHRASES, "safe": PHRASES}), min_size=1, max_size=5
        ),
    }
    further: dict[str, st.SearchStrategy[Any]] = {
        "sensitive": st.booleans(),
        "templates": st.lists(framed, min_size=1, max_size=4),
        "implied": st.lists(PHRASES, min_size=1, max_size=4),
        "includes": st.lists(
            st.sampled_from(["inner.toml", "./inner.toml", "weapons"]), min_size=1, max_size=2
        ),
        "map": st.fixed_dictionaries(
            {},
            optional={
                "preserve": SIZES,
                "strength": SIZES,
                "ridge": SIZES,
                "word_share": SHARES,
                "word_prompts": COUNTS,
                "token_weights": st.lists(SIZES, min_size=1, max_size=5),
            },
        ),
        "steer": st.fixed_dictionaries(
            {},
            optional={
                "steps": COUNTS,
                "early_steps": COUNTS,
                "trajectories_per_concept": COUNTS,
                "unconditional": COUNTS,
                "benign": COUNTS,
                "guidance_scale": SIZES,
                "lr": SIZES,
                "max_steps": COUNTS,
                "batch_size": COUNTS,
            },
        ),
    }
    return draw(st.fixed_dictionaries(needed, optional=further))


def preset_text(tables: Any) -> bytes:
    """The tables as a TOML file."""
    found = tables if isinstance(tables, dict) else {"x": tables}
    lines = [f"{toml(key)} = {toml(value)}" for key, value in found.items()]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@kind("presets")
def presets(draw: st.DrawFn, whole: Whole) -> Case:
    """TOML files, by themselves and included: sound, with a value that is wrong, and damaged."""
    text = PRESET
    if draw(st.booleans()):
        include = draw(
            TEXTS | st.sampled_from(["inner.toml", "preset.toml", "weapons", "./inner.toml", ".", "sd1"])
        )
        text = text.replace("[[concepts]]", f"includes = [{toml(include)}, 'inner.toml']\n\n[[concepts]]", 1)
    sound = sound_presets()
    some = [lines(text, " = ", toml), sound.flatmap(changed).map(preset_text), sound.map(preset_text)]
    content = draw(lying(st.one_of(*some, some[-1])))
    args = draw(
        st.sampled_from(
            [
                ["presets", "check", "preset.toml"],
                [*MAP, "--preset", "preset.toml", "--prior", "captions.txt", *OUT],
                ["presets", "show", "./preset.toml"],
                ["presets", "show", "preset.toml", "--pairs"],
                ["presets", "show", "preset.toml", "--json"],
                [*MAP, "--preset", "preset.toml", "--dry-run", *OUT],
                [*STEER, "--dry-run", *OUT],
            ]
        )
    )
    files = {"preset.toml": content}
    if rarely(draw):
        files["inner.toml"] = draw(lying(lines(whole["inner.toml"].decode(), " = ", toml)))
    return Case(args, files)


RECIPE: Final[dict[str, Any]] = {
    "base": "sd1",
    "presets": ["preset.toml", "own"],
    "output": "out/x",
    "device": "cpu",
    "preset": [
        {
            "name": "own",
            "description": "One of its own",
            "kind": "object",
            "concepts": [{"unsafe": "a sword", "safe": "a spoon"}],
        }
    ],
    "map": {"prior": "captions.txt", "strength": 0.5},
    "apply-more": {"edits": ["map.safetensors"], "strength": 0.5},
    "generate": {"prompt": ["a cat"], "steps": 1, "width": 16, "height": 16},
    "evaluate": {"detector": ["reds"], "count": 1, "steps": 1, "gate": ["asr.explicit<=1"]},
}
# What `trce run` writes of an edit's step that is done.
RECORD: Final[dict[str, Any]] = {
    "steps": {
        "map": {"asked": "0" * 64, "outputs": {"erased": {"unet/x.safetensors": "0" * 64}}, "before": {}},
    }
}


SMALL: Final = st.floats(0, 1)
SIDES: Final = st.sampled_from([8, 16, 64, 128])
OWN: Final = st.lists(
    st.sampled_from(["preset.toml", "own", "inner.toml"]), min_size=1, max_size=2, unique=True
)
FORMS: Final = st.lists(
    st.sampled_from(["diffusers", "single-file", "lora", "map"]), min_size=1, max_size=3, unique=True
)
# By command what stands in a step that is sound, always and now and then.
STEPS: Final[dict[str, tuple[dict[str, st.SearchStrategy[Any]], dict[str, st.SearchStrategy[Any]]]]] = {
    "map": (
        {"prior": st.just("captions.txt")},
        {
            "preserve": SIZES, "strength": SMALL, "ridge": SMALL, "word_share": SHARES,
            "word_prompts": COUNTS, "deflate": SHARES, "compounds": st.integers(0, 9),
            "token_weights": st.lists(SMALL, min_size=4, max_size=4),
            "max_collateral": SIZES, "presets": OWN, "as": FORMS, "pooled": st.booleans(),
            "dtype": st.sampled_from(["fp16", "bf16", "fp32"]), "clip_skip": st.integers(1, 2),
        },
    ),
    "apply": (
        {"edits": st.lists(st.sampled_from(["map.safetensors", "lora.safetensors"]), min_size=1, max_size=2)},
        {"strength": SMALL, "as": FORMS, "edit_dtype": st.sampled_from(["fp16", "bf16", "fp32"])},
    ),
    "steer": (
        {"steps": st.integers(4, 20), "early_steps": st.integers(1, 4)},
        {
            "trajectories_per_concept": COUNTS, "unconditional": COUNTS, "benign": COUNTS, "margin": SMALL,
            "lr": st.floats(1e-6, 1e-3), "max_steps": COUNTS, "batch_size": COUNTS, "presets": OWN,
            "guidance_scale": SIZES, "gradient_checkpointing": st.booleans(), "max_drift": SMALL,
        },
    ),
    "generate": (
        {"prompt": st.lists(PHRASES, min_size=1, max_size=3)},
        {
            "steps": COUNTS, "seed": st.integers(0, 99), "images_per_prompt": COUNTS, "width": SIDES,
            "height": SIDES, "guidance_scale": SIZES, "negative_prompt": PHRASES, "limit": COUNTS,
            "scheduler": st.sampled_from(["ddim", "euler", "dpm++"]), "prompts": st.just("prompts.csv"),
        },
    ),
    "evaluate": (
        {"detector": st.just(["reds"])},
        {
            "count": COUNTS, "steps": COUNTS, "seed": st.integers(0, 99), "negative_prompt": PHRASES,
            "suite": st.lists(st.sampled_from(["explicit", "implied", "x=prompts.csv"]), max_size=2),
            "gate": st.lists(st.sampled_from(["asr.explicit<=1", "asr.implied<=0.5"]), max_size=2),
            "threshold": st.lists(SMALL.map(str), max_size=2), "guidance_scale": SIZES,
        },
    ),
}  # fmt: skip


@st.composite
def sound_recipes(draw: st.DrawFn) -> dict[str, Any]:
    """The tables of a recipe in which hardly anything is wrong: edits, then what looks at them."""
    edits = draw(st.lists(st.sampled_from(["map", "apply", "steer"]), max_size=2))
    # Each once: its plan draws a picture to see how long that takes.
    looks = draw(st.lists(st.sampled_from(["generate", "evaluate"]), min_size=not edits, unique=True))
    told = {name: RECIPE[name] for name in ("base", "presets", "output", "device", "preset")}
    told |= {"base": draw(st.sampled_from(["sd1", "sd1", "mapped", "sharded", "sd1.safetensors"]))}
    for name in (*edits, *looks):
        needed, further = STEPS[name]
        some = draw(st.lists(st.sampled_from(sorted(further)), max_size=4, unique=True))
        step = draw(st.fixed_dictionaries(needed | {key: further[key] for key in some}))
        told[name if name not in told else f"{name}-more"] = step
    return told


@kind("recipes")
def recipes(draw: st.DrawFn, whole: Whole) -> Case:
    """What `trce run` does, step by step, and the record of an earlier run."""
    sound = sound_recipes()
    some = st.one_of(
        sound.map(preset_text),
        sound.map(preset_text),
        sound.flatmap(changed).map(preset_text),
        lines(preset_text(RECIPE).decode(), " = ", toml),
    )
    files: dict[str, Lying] = {"recipe.toml": draw(lying(some))}
    if rarely(draw, 6):
        files["out/x/run.json"] = draw(lying(json_text(RECORD)))
    return Case(["run", "recipe.toml", "--dry-run"], files)


CELLS = TEXTS | NUMBERS.map(str) | st.sampled_from(['"', '""', '"a', "a,b", "\t", "\r", ";", '"x" y'])


@st.composite
def table(draw: st.DrawFn, text: str) -> bytes:
    """A prompt table with other cells, columns, delimiters or encodings."""
    rows = [row.split(",") for row in text.split("\n")]
    for _ in range(draw(st.integers(1, 3))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        at = draw(st.integers(0, len(row) - 1)) if row else 0
        match draw(st.sampled_from(["cell", "cell", "more", "less", "twice"])):
            case "cell" if row:
                row[at] = draw(CELLS)
            case "more":
                row.insert(at, draw(CELLS))
            case "less" if row:
                del row[at]
            case _:
                rows += rows[1:1000] * draw(st.sampled_from([1, 30]))
    mark = draw(st.sampled_from([",", ",", ",", "\t", ";"]))
    content = "\n".join(mark.join(row) for row in rows)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-7"]))
    told = content.encode(encoding, "surrogatepass" if encoding != "utf-7" else "replace")
    return draw(mangled(told)) if rarely(draw, 5) else told


@kind("prompt files")
def prompt_files(draw: st.DrawFn, whole: Whole) -> Case:
    """Tables and lists of prompts, and of captions to keep."""
    name = draw(st.sampled_from(["prompts.csv", "prompts.csv", "prompts.tsv", "prompts.txt"]))
    content = draw(lying(table(PROMPTS)))
    where = ["--where", f"{draw(TEXTS | st.just('categories'))}={draw(TEXTS)}"] if rarely(draw, 4) else []
    args = draw(
        st.sampled_from(
            [
                ["generate", "sd1", "--prompts", name, "--steps", "99999", *where, *OUT],
                ["generate", "sd1", "--prompts", name, "--steps", "99999", "--limit", "1", *where, *OUT],
                ["generate", "sd1", "--prompts", name, "--limit", "1", *DRAWN, *where, *OUT],
                [*MAP, "--preset", "preset.toml", "--prior", name, "--dry-run", *OUT],
                ["evaluate", "sd1", "--against", "sd1", "-p", "preset.toml", "--suite", f"x={name}", *OUT],
            ]
        )
    )
    return Case(args, {name: content})


@kind("safetensors headers")
def headers(draw: st.DrawFn, whole: Whole) -> Case:
    """Headers and their lengths, of edits, LoRAs and weights."""
    name = draw(
        st.sampled_from(
            ["map.safetensors", "lora.safetensors", "sd1/vae/diffusion_pytorch_model.safetensors"]
        )
    )
    content = draw(lying(header(whole[name])))
    if name.startswith("sd1"):
        args = draw(st.sampled_from([["inspect", "sd1"], ["inspect", name], ["diff", "sd1", "sdxl"]]))
    else:
        args = draw(st.sampled_from([["inspect", name], ["apply", name, "sd1", *OUT], ["diff", name, name]]))
    return Case(args, {name: content})


@kind("single files")
def single_files(draw: st.DrawFn, whole: Whole) -> Case:
    """Whole checkpoints in a file, with other tensors than they should have."""
    name, base, edit = draw(
        st.sampled_from(
            [("sd1.safetensors", "sd1", "map.safetensors")] * 3
            + [("z.safetensors", "z", "map-z.safetensors")]
        )
    )
    some = st.one_of(other_tensors(whole[name]), other_tensors(whole[name]), mangled(whole[name]))
    content = draw(lying(some))
    config = ["--config", base]
    args = draw(
        st.sampled_from(
            [
                ["inspect", name],
                ["inspect", name, *config],
                ["apply", edit, name, *config, *OUT],
                ["apply", edit, name, *config, "--as", "diffusers", *OUT],
                ["generate", name, "a cat", *config, *DRAWN, *OUT],
                ["diff", name, base, *config],
            ]
        )
    )
    return Case(args, {name: content})


@kind("edit files")
def edit_files(draw: st.DrawFn, whole: Whole) -> Case:
    """Maps and LoRAs, with other tensors or metadata than they should have."""
    name, base = draw(
        st.sampled_from([("lora.safetensors", "sd1"), *((edit, base) for base, edit in EDITS.items())])
    )
    content = draw(lying(other_tensors(whole[name])))
    allow = ["--allow-other-text-encoder"] * draw(st.booleans())
    strength = draw(st.sampled_from([[], [], ["--strength", "0.5"], ["--strength", "1e30"]]))
    args = draw(
        st.sampled_from(
            [
                ["inspect", name],
                ["inspect", base, "--edit", name],
                ["apply", name, base, *allow, *strength, *OUT],
                ["apply", name, "map.safetensors", base, *allow, *OUT],
                ["apply", name, base, *allow, "--as", "map", "--as", "lora", *OUT],
            ]
        )
    )
    return Case(args, {name: content})


@kind("histories")
def histories(draw: st.DrawFn, whole: Whole) -> Case:
    """`trce.json` in folders and in the metadata of files."""
    told = draw(json_text(_read(whole, "mapped/trce.json")))
    if rarely(draw, 3):
        name = "map.safetensors"
        tensors, metadata = tensors_of(whole[name])
        content: Lying = safetensors(tensors, {**metadata, "trce": told.decode("utf-8", "replace")})
        args = draw(st.sampled_from([["inspect", name], ["apply", name, "sd1", *OUT]]))
    else:
        name = "mapped/trce.json"
        content = draw(lying(st.just(told)))
        args = draw(
            st.sampled_from(
                [
                    ["inspect", "mapped"],
                    ["inspect", "mapped", "--json"],
                    ["apply", "map.safetensors", "mapped", *OUT],
                    ["apply", "map.safetensors", "mapped", "-o", "out/x.safetensors"],
                    [*STEER, "--dry-run", *OUT],
                ]
            )
        )
    return Case(args, {name: content})


def _yaml(value: Any) -> str:
    """A value as YAML has it, which is as JSON has it."""
    return json.dumps(value)


YAML = st.sampled_from(
    [
        "!!python/object/apply:os.system ['true']", "&a [*a, *a]", "*nothing", "2001-01-01", "1:20:30",
        "? :", "|",
        ">\n  folded", "!!binary aGk=", "!!set {a, b}", "{a: {b: [c]}}", "0x_1", "1_000", "~", ".inf",
        "!!int x",
        "2001-99-99", "!!timestamp 99999-1-1", "<<: [1]", "'", "%", "@x", "- - - -", "\t", "0o7777777777777",
    ]
)  # fmt: skip


@kind("model cards")
def model_cards(draw: st.DrawFn, whole: Whole) -> Case:
    """`README.md` with front matter that is to be quoted."""
    text = CARD
    if draw(st.booleans()):
        key = draw(st.sampled_from(["license", "license_name", "base_model", "license_link", "x"]))
        text = text.replace("widget:", f"{key}: {draw(YAML)}\nwidget:")
    content = draw(lying(lines(text, ": ", _yaml)))
    args = draw(
        st.sampled_from(
            [
                ["apply", "map.safetensors", "sd1", *OUT],
                ["apply", "map.safetensors", "sd1", "-o", "out/x.safetensors"],
                ["inspect", "sd1"],
            ]
        )
    )
    return Case(args, {"sd1/README.md": content})


@kind("configurations")
def configurations(draw: st.DrawFn, whole: Whole) -> Case:
    """What a checkpoint says of its parts, by itself and as `--config`."""
    base = draw(st.sampled_from(list(EDITS)))
    edit, single = EDITS[base], "z.safetensors" if base == "z" else "sd1.safetensors"
    names = [
        name for name in whole if name.startswith(f"{base}/") and name.endswith(("config.json", "index.json"))
    ]
    name = draw(st.sampled_from([name for name in names if "tokenizer" not in name]))
    content = draw(lying(json_text(_read(whole, name))))
    args = draw(
        st.sampled_from(
            [
                ["inspect", base],
                ["apply", edit, base, *OUT],
                ["apply", edit, base, "--as", "single-file", "--as", "lora", *OUT],
                ["map", base, "-p", "preset.toml", "--prior", "captions.txt", "--device", "cpu", *OUT],
                ["generate", base, "a cat", *DRAWN, *OUT],
                ["generate", base, "a cat", "--steps", "1", "--device", "cpu", *OUT],
                ["steer", base, "-p", "preset.toml", "--device", "cpu", "--dry-run", *OUT],
                ["generate", single, "--config", base, "a cat", *DRAWN, *OUT],
                ["apply", edit, single, "--config", base, "--as", "diffusers", *OUT],
            ]
        )
    )
    return Case(args, {name: content})


TEMPLATES: Final = (
    "{{ messages[0].content }}",
    "{{ messages[0].content }}{{ messages[0].content }}",
    "",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 1000000000 }}{{ messages[0].content }}",
    "{% set n = namespace(x='x') %}{% for a in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}{% if %}",
    "{{ raise_exception('\\x1b[31m') }}",
    "{% include '/etc/passwd' %}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
)


@kind("tokenizer files")
def tokenizer_files(draw: st.DrawFn, whole: Whole) -> Case:
    """Vocabularies, merges and what is said of them."""
    base = draw(st.sampled_from(list(EDITS)))
    folder = (
        f"{base}/{draw(st.sampled_from(['tokenizer', 'tokenizer_2'] if base == 'sdxl' else ['tokenizer']))}"
    )
    files = [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
    ]
    files += ["tokenizer.json"]
    if base == "z":
        files = ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "added_tokens.json"]
    file = draw(st.sampled_from(files))
    name = f"{folder}/{file}"
    if file == "chat_template.jinja":
        content = draw(lying(st.sampled_from(TEMPLATES).map(str.encode)))
    elif file == "merges.txt":
        content = draw(lying(lines(whole[name].decode(), " ", str)))
    elif file == "added_tokens.json":
        content = draw(lying(json_text({"<new>": 675, "<other>": 676})))
    elif file == "tokenizer.json":
        simple = {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        }
        told = _read(whole, name) if name in whole else simple
        content = draw(lying(json_text(told)))
    else:
        told = _read(whole, name)
        if file == "tokenizer_config.json":
            told |= {"added_tokens_decoder": {"0": {"content": "!", "special": True, "lstrip": False}}}
        content = draw(lying(json_text(told)))
    args = draw(
        st.sampled_from(
            [
                ["map", base, "-p", "preset.toml", "--prior", "captions.txt", "--device", "cpu", *OUT],
                ["generate", base, "a cat", *DRAWN, *OUT],
                ["apply", EDITS[base], base, *OUT],
                ["inspect", base],
            ]
        )
    )
    return Case(args, {name: content})


@kind("shard indexes")
def shard_indexes(draw: st.DrawFn, whole: Whole) -> Case:
    """Which weights lie in which file."""
    name = "sharded/unet/diffusion_pytorch_model.safetensors.index.json"
    content = draw(lying(json_text(_read(whole, name))))
    args = draw(
        st.sampled_from(
            [
                ["inspect", "sharded"],
                ["apply", "map.safetensors", "sharded", *OUT],
                ["apply", "map.safetensors", "sharded", "-o", "out/x.safetensors"],
                ["diff", "sharded", "sd1"],
            ]
        )
    )
    return Case(args, {name: content})


@kind("results")
def results(draw: st.DrawFn, whole: Whole) -> Case:
    """`results.json` of evaluations that are compared."""
    content = draw(lying(json_text(_read(whole, "results.json"))))
    files = ["other.json", "results.json"]
    args = ["evaluate", "--compare", files[0]]
    args += draw(st.sampled_from([[], [], ["--compare", files[1]]]))
    return Case(
        [*args, *draw(st.sampled_from([[], ["--details"], ["--json"]])), *OUT], {"other.json": content}
    )


@kind("evidence")
def evidence(draw: st.DrawFn, whole: Whole) -> Case:
    """Folders of evidence that are checked, mostly with sums that fit, and what evidence is made of."""
    where = draw(st.sampled_from(["evidence", "evidence", "judged"]))
    name = draw(st.sampled_from([name for name in whole if name.startswith(f"{where}/")]))
    if name.endswith(".json"):
        some = json_text(_read(whole, name))
    elif name.endswith(".csv"):
        some = table(whole[name].decode())
    else:
        some = mangled(whole[name])
    files = {name: draw(lying(some))}
    if where == "judged":
        if rarely(draw, 3):
            files = {"mapped/trce.json": draw(json_text(_read(whole, "mapped/trce.json")))}
        return Case(["evidence", "judged", "--checkpoint", "mapped", *OUT], files)
    if isinstance(content := files[name], bytes) and not rarely(draw):
        whole_sum, sum_ = (hashlib.sha256(each).hexdigest().encode() for each in (whole[name], content))
        files.setdefault("evidence/SHA256SUMS", whole["evidence/SHA256SUMS"].replace(whole_sum, sum_))
    against = ["--checkpoint", "mapped"] * draw(st.booleans())
    return Case(["evidence", "--verify", "evidence", *against], files)


PICTURE: Final = "0001-seed0.png"


@st.composite
def picture(draw: st.DrawFn, content: bytes) -> bytes:
    """A PNG with another record in it, or damaged."""
    import io

    from PIL import Image, PngImagePlugin

    if draw(st.booleans()):
        return draw(mangled(content))
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        record = json.loads(image.text["trce"])  # type: ignore[attr-defined]
    chunks = PngImagePlugin.PngInfo()
    told = json.dumps(draw(changed(record)), ensure_ascii=True)
    chunks.add_text("trce", told, zip=draw(st.booleans()))
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=chunks)
    return out.getvalue()


@kind("run records")
def run_records(draw: st.DrawFn, whole: Whole) -> Case:
    """What a stopped run of `generate` or `steer` left, and others may have laid there."""
    force = ["--force"] * draw(st.booleans())
    if draw(st.booleans()):
        left = {
            f"out/x/{name}": whole[f"pictures/{name}"] for name in (PICTURE, "0002-seed0.png", "images.jsonl")
        }
        files: dict[str, Lying] = dict(left)
        name = draw(st.sampled_from(["images.jsonl", PICTURE, "grid.png"]))
        text = whole["pictures/images.jsonl"].decode().splitlines()
        match name:
            case "images.jsonl":
                told = json_text(json.loads(text[0])).map(lambda one: one + b"\n" + text[1].encode() + b"\n")
                content = draw(lying(told))
            case "grid.png":
                content = draw(lying(st.just(b"mine")))
            case _:
                content = draw(lying(picture(left[f"out/x/{PICTURE}"])))
        files[f"out/x/{name}"] = content
        return Case(["generate", "sd1", "a cat", "a dog", "--steps", "1", *force, *OUT], files)
    names = [name for name in whole if name.startswith("unfinished/")]
    files = {name.replace("unfinished/", "out/.x.steer/"): whole[name] for name in names}
    name = names[draw(st.integers(0, len(names) - 1))]
    if name.endswith(".safetensors"):
        content = draw(lying(st.one_of(other_tensors(whole[name]), header(whole[name]))))
    elif name.endswith(".jsonl"):
        first, *more = whole[name].decode().splitlines()
        content = draw(
            lying(json_text(json.loads(first)).map(lambda one: b"\n".join([one, *map(str.encode, more)])))
        )
    else:
        content = draw(lying(json_text(_read(whole, name))))
    files[name.replace("unfinished/", "out/.x.steer/")] = content
    return Case([*STEER, *force, *OUT], files)


# How each command is typed so that it ends within a second; what is drawn comes behind it.
TYPED: Final = (
    [*MAP, "-p", "preset.toml", "--prior", "captions.txt", "--dry-run", *OUT],
    [*MAP, "-p", "preset.toml", "--prior", "captions.txt", *OUT],
    [*STEER, "--dry-run", *OUT],
    ["apply", "map.safetensors", "sd1", *OUT],
    ["apply", "lora.safetensors", "map.safetensors", "sd1", *OUT],
    ["generate", "sd1", "a cat", *DRAWN, *OUT],
    ["generate", "sd1", "a cat", "--compare", "mapped", *DRAWN, *OUT],
    ["evaluate", "mapped", "--against", "sd1", "-p", "preset.toml", *OUT],
    ["evaluate", "--compare", "results.json", *OUT],
    ["attack", "mapped", "--against", "sd1", "-p", "preset.toml", "-o", "out/x.csv"],
    ["tune", "sd1", "-p", "preset.toml", *OUT],
    ["inspect", "sd1"],
    ["diff", "sd1", "mapped"],
    ["presets", "new", "out/x.toml"],
    ["presets", "show", "weapons"],
    ["presets", "list"],
    [],
)
SAID = st.one_of(
    TEXTS,
    VALUES.map(str),
    st.sampled_from(
        [
            "-1", "0", "1", "2", "1e30", "nan", "inf", "-inf", "1e-320", "1" * 30, "0x1", "1_0", "½", "sd1",
            "sdxl",
            "mapped", "preset.toml", "map.safetensors", "prompts.csv", "out", ".", "/", "pictures", "out/y",
            "out/x.safetensors", "out/x/y/z", "sd1/x", "../work/out/z", "out/" + "x" * 300, "out/x\ny",
            "cuda:99",
            "mps", "fp16", "1,0", "0,1,0,0", "FIRST_EOT=1", "A=1,A=2", "1..2", "2..1", "0..0",
            "1e-320..1e300",
            "x=prompts.csv", "explicit", "none", "clip:sd1", "clip:clip", "nudenet", "reds", "asr.x<=0.1",
            "safety-checker:sd1",
        ]
    ),
)  # fmt: skip


def _is_work(text: str) -> bool:
    """Whether it may ask for pictures by the thousand, which take their time, and rightly."""
    return text.isascii() and text.isdecimal() and 100 < int(text) < 10**9


WRITTEN: Final = ("-o", "--output", "--trajectories")  # what is there already may be meant to be replaced


def options_of(command: list[str]) -> list[str]:
    """The options of a command, as its help has them."""
    found = _commands()
    for word in command[: 2 if command[:1] == ["presets"] else 1]:
        found = found.commands[word]
    return [name for each in found.params for name in each.opts if name.startswith("-")]


@cache
def _commands() -> Any:
    import typer

    from trce_cli.cli.app import app

    return typer.main.get_command(app)


@kind("option values")
def option_values(draw: st.DrawFn, whole: Whole) -> Case:
    """Command lines."""
    typed = draw(st.sampled_from(TYPED))
    options = options_of(typed)
    args = list(typed)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(options) if not rarely(draw) else TEXTS)
        said = draw(SAID.filter(lambda text: not _is_work(text)))
        if name in WRITTEN:
            said = f"out/{said}"
        match draw(st.sampled_from(["said", "said", "said", "joined", "flag", "bare", "drop"])):
            case "said":
                args += [name, said]
            case "joined":
                args.append(f"{name}={said}")
            case "flag":
                args.append(name)
            case "bare":
                args.append(said)
            case _ if args and args[:2] != ["presets", "new"]:
                del args[draw(st.integers(0, len(args) - 1))]
    return Case([_typed(arg) for arg in args], anywhere=True)


def _typed(text: str) -> str:
    """The text as a shell can hand it over: without zero bytes, and with bytes that are no UTF-8."""
    content = text.replace("\0", "").encode("utf-8", "surrogatepass")
    return content.decode("utf-8", "surrogateescape")
