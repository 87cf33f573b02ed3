"""`trce evidence`: what an auditor gets, and checks."""

from pathlib import Path
from typing import Annotated

import typer

from trce_cli.cli.options import Answer, Force, Opening, with_options


@with_options
def evidence(
    opening: Opening,
    answer: Answer,
    evaluations: Annotated[
        list[Path] | None,
        typer.Argument(metavar="EVALUATION", help="Output folders of `trce evaluate`.", show_default=False),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="CHECKPOINT",
            help="The erased checkpoint, where it no longer lies where it was evaluated; with --verify: "
            "compare its files too.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Where the evidence goes.", show_default=False),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            "--verify", metavar="DIR", help="Check evidence instead of writing it.", show_default=False
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Collect what shows what was erased, or check it.

    One folder: reports, history, hashes and a CycloneDX ML-BOM. To check it, no picture is drawn.
    """
    from trce_cli.errors import BadInput
    from trce_cli.evaluate import evidence as room

    console = answer.console()
    if verify is not None:
        if evaluations or output is not None:
            raise BadInput(
                "--verify takes the evidence's folder alone.", "Leave out EVALUATION and --output."
            )
        digest = room.verify(verify, opening.open(checkpoint) if checkpoint else None)
        console.show(f"{verify} holds. SHA-256 of its {room.SUMS}: {digest}")
        console.result({"verified": str(verify), "sha256": digest})
        return
    if not evaluations or output is None:
        raise BadInput(
            "There is nothing to collect.", "Give EVALUATION... and --output DIR, or --verify DIR."
        )
    source = opening.open(checkpoint or room.evaluated(evaluations[0]))
    with console.progress() as progress:
        report = progress.task("Hashing", len(source.drawn_from()), "files")
        digest = room.collect(evaluations, source, output, force, report)
    console.show(f"Wrote {output}. SHA-256 of its {room.SUMS}, to publish elsewhere: {digest}")
    console.note(f"Next: trce evidence --verify {output}")
    console.result({"output": str(output), "sha256": digest})
