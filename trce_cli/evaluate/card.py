"""The evaluated checkpoint's own model card: figures as `model-index`, what still gets through, pictures."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.measured import CARD, DATASET, PICTURE, with_figures
from trce_cli.checkpoint.provenance import NAME, card_of, history
from trce_cli.errors import BadInput, TrceError
from trce_cli.evaluate.scores import ROLES
from trce_cli.evaluate.verdicts import asks, bounded, share
from trce_cli.images.grid import draw_grid
from trce_cli.images.record import load
from trce_cli.maths.statistics import LEVEL
from trce_cli.system.foreign import check_unchanged, read_text
from trce_cli.system.whole import write_bytes, write_text

HINT: Final = "Evaluate the folder that `trce map`, `steer` or `apply` wrote, or leave --card out."
PAIRS: Final = 6  # of pictures; more make a card that is scrolled past


def check_card(checkpoint: Checkpoint, original: Checkpoint) -> None:
    """Raise, before anything is drawn, where the checkpoint has no card of its own to write figures into.

    BadInput for what lies in the hub's cache, checkpoints without history, the original itself and cards that
    cannot be read; TrceError without permission to write.
    """
    name, folder = checkpoint.name, checkpoint.path
    if any(part.startswith("models--") for part in folder.resolve().parts):
        raise BadInput(
            f"{name} lies in the hub's cache, where --card writes nothing.",
            "Evaluate a folder of your own: hf download OWNER/NAME --local-dir DIR",
        )
    if folder.samefile(original.path):
        raise BadInput(
            f"{name} is evaluated against itself, which is nothing for its model card.",
            "Name what it was made from with --against, or leave --card out.",
        )
    entries = history(checkpoint)
    if not entries:
        raise BadInput(
            f"{name} has no {NAME}: what was done to it is not known, so that --card cannot tell it.",
            HINT,
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TrceError(f"{folder / CARD} cannot be written: no permission.", "Leave --card out.")
    with_figures(held(folder / CARD) or "", str(folder / CARD), "", [], "")


def held(card: Path) -> str | None:
    """The text of a card, None where there is none; BadInput for what is no text, which would be lost."""
    return read_text(card) if os.path.lexists(card) else None


def write_card(
    checkpoint: Checkpoint,
    results: Mapping[str, Any],
    verdicts: Mapping[str, Sequence[Mapping[str, Any]]],
    output: Path,
) -> Path:
    """Write an evaluation's figures and pictures into the checkpoint's model card, and return its path.

    output: of the evaluation, where its pictures lie. Without a card the whole of it is written. Pictures of
    sensitive presets are left out. Raises TrceError where the checkpoint is no longer what was measured, and
    BadInput where its card cannot be read.
    """
    card, picture = checkpoint.path / CARD, checkpoint.path / PICTURE
    files = checkpoint.drawn_from().values()
    check_unchanged({path: checkpoint.identities[path] for path in files})
    rows = [] if results["sensitive"] else list(pictured(results, verdicts))
    if rows:
        drawn = [(label, remark, [load(output / file) for file in pair]) for label, remark, pair in rows]
        buffer = io.BytesIO()
        draw_grid(drawn, ROLES).save(buffer, format="PNG")
        if not (picture.is_file() and picture.read_bytes() == buffer.getvalue()):
            write_bytes(picture, buffer.getvalue())
    before = held(card)
    text = card_of(checkpoint, history(checkpoint)) if before is None else before
    name = results["erased"]["name"]
    text = with_figures(text, str(card), name, list(model_results(results)), told(results, bool(rows)))
    if text != before:
        write_text(card, text)
    if not rows:
        picture.unlink(missing_ok=True)
    return card


def pictured(
    results: Mapping[str, Any], verdicts: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[str, str, list[str]]]:
    """(prompt, suite and seed, files of both pictures): the first prompt of each suite, then the second ones.

    None of a user's own file, which may hold what no card should.
    """
    suites = [suite["name"] for suite in results["suites"] if suite["role"] != "own"]
    turns = zip_longest(*(verdicts[name] for name in suites))
    shown = [row for turn in turns for row in turn if row is not None]
    for row in shown[:PAIRS]:
        files = [f"images/{row['suite']}/{row['files'][role]}" for role in ROLES]
        yield row["prompt"], f"{row['suite']}, seed {row['seed']}", files


# --- what the hub reads


def model_results(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The evaluation's rates as results of a `model-index`, one a suite, and one a suite after a treatment.

    A metric's value is a share of 1, its `args` the 95 % interval, counts, and the original's share.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    for config, title, metrics in metrics_of(results):
        found = [
            EvalResult(
                task_type="text-to-image",
                task_name="Concept erasure",
                dataset_type=f"{DATASET}{config}",
                dataset_name=title,
                dataset_config=config,
                metric_type=kind,
                metric_name=name,
                metric_value=rounded(rate["share"]),
                metric_args={
                    "low": rounded(rate["low"]),
                    "high": rounded(rate["high"]),
                    "level": LEVEL,
                    "interval": "Wilson",
                    "hits": rate["hits"],
                    "total": rate["total"],
                    **({"original": rounded(original["share"])} if original else {}),
                },
            )
            for kind, name, rate, original in metrics
            if rate["total"]
        ]
        if found:
            yield eval_results_to_model_index("", found)[0]["results"][0]


Metric = tuple[str, str, Mapping[str, Any], Mapping[str, Any] | None]


def metrics_of(results: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Metric]]]:
    """(suite, what it asks, its metrics): each with its kind, its name, the erased checkpoint's rate, and the
    original's."""
    for suite in results["suites"]:
        found: list[Metric] = [
            ("attack-success-rate", f"still shown ({each['convention']})", each["erased"], each["original"])
            for each in suite["asr"]
        ]
        if "kept" in suite:
            found.append(("kept", "kept", suite["kept"]["kept"], None))
        yield suite["name"], f"trce evaluate, {suite['name']}: {asks(suite['name'])}", found
    for state in results["survivals"]:
        for suite in state["suites"]:
            first = suite["asr"][0]
            named = f"still shown ({first['convention']})"
            found = [("attack-success-rate", named, first["treated"], first["original"])]
            if "kept" in suite:
                found.append(("kept", "kept", suite["kept"]["treated"], None))
            title = f"trce evaluate, {suite['name']}, {state['title']}"
            yield f"{suite['name']}-after-{state['state']}", title, found


def rounded(share: float | None) -> float | None:
    """A share as a file for people has it."""
    return None if share is None else round(share, 4)


# --- what people read


def told(results: Mapping[str, Any], has_picture: bool) -> str:
    """The figures in Markdown: a sentence, a line a suite, what still gets through, and pictures."""
    return "\n".join(
        [
            f"**{results['verdict']['sentence']}**",
            "",
            how(results),
            "",
            *table(results),
            "",
            "In brackets 95 % intervals. *Kept* is the share of what the original shows that is still there.",
            "",
            *left(results),
            "",
            *picture_lines(results, has_picture),
        ]
    )


def how(results: Mapping[str, Any]) -> str:
    """Who measured what, and with which settings."""
    settings = results["settings"]
    guidance = " and ".join(f"{each:g}" for each in settings["guidance_scale"])
    return (
        f"Measured on {results['date'][:10]} with `trce evaluate` {results['versions']['trce']} against "
        f"`{results['original']['name']}`, which drew the same prompts from the same seeds in "
        f"{settings['steps']} steps of {settings['scheduler']} with guidance {guidance}. What a picture "
        f"shows was told by `{results['suites'][0]['asr'][0]['convention']}`."
    )


def picture_lines(results: Mapping[str, Any], has_picture: bool) -> list[str]:
    """The picture with its caption, or that there is none."""
    if has_picture:
        said = f"![Prompts drawn by the original and by this checkpoint, from the same seeds]({PICTURE})"
        return [said, "", "*The first prompts of each suite, before and after; not chosen.*"]
    return ["Pictures are left out: what was erased is sensitive."] if results["sensitive"] else []


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """A line a suite."""
    yield "| suite | prompts | original shows it | still shown | kept |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for suite in results["suites"]:
        name, first = suite["name"], suite["asr"][0]
        kept = suite["kept"]["kept"] if "kept" in suite else None
        cells = [
            name,
            f"{suite['prompts']}: {asks(name)}",
            share(first["original"]),
            bounded(first["erased"]),
            bounded(kept) if kept and kept["total"] else "",
        ]
        yield f"| {' | '.join(cells)} |"


def left(results: Mapping[str, Any]) -> Iterator[str]:
    """What is still shown, most first, also after what happens to published models; and what was lost."""
    asked = [suite for suite in results["suites"] if suite["role"] != "benign"]
    rates = [(suite["asr"][0]["erased"], suite["name"]) for suite in asked]
    shown = [(rate, name) for rate, name in rates if rate["hits"]]
    for rate, name in sorted(shown, key=lambda each: -each[0]["share"]):
        yield f"- **Still shown** in {rate['hits']} of {rate['total']} pictures of `{name}`: {bounded(rate)}."
    if rates and not shown:
        most = max((rate for rate, _ in rates), key=lambda rate: rate["high"])
        yield (
            f"- **Still shown** in none of these pictures, {most['total']} of them in the smallest suite, "
            f"which leaves room for up to {100 * most['high']:.1f} %."
        )
    for state in results["survivals"]:
        treated = [(suite["asr"][0]["treated"], suite) for suite in state["suites"]]
        told = [
            (rate, suite["name"]) for rate, suite in treated if suite["role"] != "benign" and rate["total"]
        ]
        for rate, name in sorted(told, key=lambda each: -each[0]["share"])[:1]:
            title = state["title"][:1].upper() + state["title"][1:]
            yield f"- **{title}**: still shown in {bounded(rate)} of the pictures of `{name}`."
    yield from (f"- {each['sentence']}" for each in results["returns"])
    kept = [(suite["kept"]["kept"], suite["name"]) for suite in results["suites"] if "kept" in suite]
    lost = [(rate, name) for rate, name in kept if rate["hits"] < rate["total"]]
    for rate, name in sorted(lost, key=lambda each: each[0]["share"]):
        yield f"- **Lost** in {rate['total'] - rate['hits']} of {rate['total']} pictures of `{name}`."
