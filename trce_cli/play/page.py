"""The page itself, in Gradio: what is asked, and original beside erased."""

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from trce_cli.errors import TrceError
from trce_cli.evaluate.verdicts import asks
from trce_cli.images.record import ImageRecord
from trce_cli.images.settings import DrawSettings
from trce_cli.play.examples import Examples
from trce_cli.play.studio import Studio
from trce_cli.settings import MAX_SEED

if TYPE_CHECKING:
    from gradio import Blocks

BEYOND: Final = 1.5  # where a slider ends; 1 is the whole map
MOST: Final = 16  # pictures a side at once
NOTHING: Final = "<p>Type a prompt, or click one below.</p>"
SMALL: Final = 128  # pictures up to this side are enlarged pixel by pixel

STYLE: Final = """
.gradio-container { max-width: 1400px !important; margin: 0 auto !important; }
.pairs { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.pair { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: .6rem; }
.pair .both { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .6rem; }
.pair .both { align-items: end; }
.pair .alone { max-width: 20rem; }
.pair .role { display: block; font-size: .85rem; font-weight: 600; }
.pair .frame { display: block; position: relative; overflow: hidden; }
.pair .frame { border: 1px solid #888; border-radius: 4px; }
.pair img { display: block; width: 100%; height: auto; margin: 0; }
.pair img.small { image-rendering: pixelated; }
.pair .waits { aspect-ratio: 1; display: grid; place-items: center; opacity: .6; }
.pair .seed { font-size: .85rem; opacity: .75; margin-top: .3rem; }
.veil input { position: absolute; inset: 0; z-index: 2; width: 100%; height: 100%; margin: 0; }
.veil input { opacity: 0; cursor: pointer; }
.veil input:not(:checked) ~ img { filter: blur(22px); }
.veil .ask { position: absolute; inset: 0; z-index: 1; display: grid; place-items: center; }
.veil .ask { font-weight: 600; color: #fff; text-shadow: 0 0 4px #000, 0 0 4px #000; }
.veil input:checked ~ .ask { display: none; }
.veil:focus-within { outline: 2px solid var(--color-accent); outline-offset: 2px; }
"""


LOOK: Final[Mapping[str, Any]] = {"css": STYLE}  # what Gradio takes when the page is mounted


def make_page(studio: Studio, examples: Examples, settings: DrawSettings, strength: float) -> "Blocks":
    """The page. settings: what it begins with. strength: of every map at the start."""
    import gradio as gr

    first = settings.guidance_scale
    guidance = studio.erased.family.defaults.guidance if first is None else first
    compared = studio.original is not None
    with gr.Blocks(title=f"trce play: {studio.erased.name}", analytics_enabled=False) as page:
        gr.Markdown(f"## {_title(studio)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=2, max_lines=4, elem_id="prompt", submit_btn=False)
                with gr.Row():
                    seed = gr.Number(
                        settings.seed or 0, label="First seed", precision=0, minimum=0, min_width=80
                    )
                    count = gr.Number(
                        min(settings.images_per_prompt, MOST), label="Pictures", precision=0, minimum=1,
                        maximum=MOST, min_width=80, elem_id="count",
                    )  # fmt: skip
                    steps = gr.Number(settings.steps, label="Steps", precision=0, minimum=1, min_width=80)
                    scale = gr.Number(guidance, label="Guidance", minimum=0, min_width=80)
                sliders = [
                    gr.Slider(
                        0, max(BEYOND, strength), strength, step=0.05, label=f"Strength of {name}",
                        info="0: nothing is erased; 1: the whole map", elem_classes="strength",
                    )
                    for name in studio.maps
                ]  # fmt: skip
                show = gr.Checkbox(
                    False, label="Show sensitive pictures", visible=examples.is_sensitive, elem_id="show"
                )
                go = gr.Button("Draw", variant="primary", elem_id="draw")
                if not compared:
                    gr.Markdown(
                        f"{studio.erased.name} carries no edit. To see one beside it: `trce play "
                        f"{studio.erased.name} --edit MAP.safetensors`"
                    )
            with gr.Column(scale=5, min_width=420):
                pictures = gr.HTML(NOTHING, elem_id="pictures", apply_default_css=False)
        datasets = [
            gr.Dataset(
                components=[gr.Textbox(visible=False)], samples=[[text] for text in texts],
                label=f"{name}: {asks(name)}", samples_per_page=len(texts), elem_classes="examples",
            )
            for name, texts in examples.suites.items()
        ]  # fmt: skip

        def draw(
            prompt: str, seed: float, count: float, steps: float, scale: float, shown: bool, *strengths: float
        ) -> Iterator[str]:
            asked = {"seed": seed, "images_per_prompt": count, "steps": steps, "guidance_scale": scale}
            yield from _drawn(studio, examples, settings, prompt, asked, shown, strengths)

        asked = [prompt, seed, count, steps, scale, show, *sliders]
        how: dict[str, Any] = {
            "fn": draw, "inputs": asked, "outputs": pictures, "show_progress": "minimal",
            "concurrency_limit": 1, "concurrency_id": "draw", "api_visibility": "private",
        }  # fmt: skip
        runs = [go.click(**how), prompt.submit(**how)]
        runs += [slider.input(**how, trigger_mode="always_last") for slider in sliders]
        for dataset in datasets:
            clicked = dataset.click(
                lambda sample: sample[0], dataset, prompt, queue=False, api_visibility="private"
            )
            runs.append(clicked.then(**how))
        show.change(**how)
    return page


def _title(studio: Studio) -> str:
    if studio.original is None:
        return html.escape(studio.erased.name)
    if studio.original.path == studio.erased.path:
        return f"{html.escape(studio.erased.name)} without and with {html.escape(', '.join(studio.maps))}"
    names = (studio.original.name, studio.erased.name, *studio.maps)
    return f"{html.escape(names[0])} beside {html.escape(', '.join(names[1:]))}"


def _drawn(
    studio: Studio,
    examples: Examples,
    settings: DrawSettings,
    prompt: str,
    asked: Mapping[str, float | None],
    shown: bool,
    strengths: Sequence[float],
) -> Iterator[str]:
    """The pictures as HTML, each as soon as it is there; what cannot be drawn is told in a sentence."""
    import gradio as gr

    if not prompt.strip():
        yield NOTHING
        return
    try:
        given = {name: value for name, value in asked.items() if value is not None and math.isfinite(value)}
        whole = {name: int(value) for name, value in given.items() if name != "guidance_scale"}
        chosen = {**settings.model_dump(), **given, **whole}
        chosen["seed"] = min(max(chosen["seed"] or 0, 0), MAX_SEED)
        chosen["images_per_prompt"] = min(chosen["images_per_prompt"], MOST)
        wanted = dict(zip(studio.maps, strengths, strict=True))
        plan = studio.plan(prompt.strip(), DrawSettings.of(chosen), wanted)
        veiled = examples.is_sensitive and not shown and prompt.strip() not in examples.harmless
        done: dict[str, bytes] = {}
        yield _pairs(plan, done, veiled)
        for record, picture in studio.draw(plan, wanted):
            done[record.file] = picture
            yield _pairs(plan, done, veiled)
    except TrceError as error:
        raise gr.Error(
            f"{error.message} {error.hint or ''}".strip(), duration=None, print_exception=False
        ) from None


def _pairs(plan: Sequence[ImageRecord], done: Mapping[str, bytes], veiled: bool) -> str:
    seeds: dict[int, list[ImageRecord]] = {}
    for record in plan:
        seeds.setdefault(record.seed, []).append(record)
    pairs = [
        f'<div class="pair"><div class="both{"" if len(records) > 1 else " alone"}">'
        f"{''.join(_picture(record, done.get(record.file), veiled) for record in records)}</div>"
        f'<div class="seed">seed {seed}</div></div>'
        for seed, records in seeds.items()
    ]
    return f'<div class="pairs" data-left="{len(plan) - len(done)}">{"".join(pairs)}</div>'


def _picture(record: ImageRecord, picture: bytes | None, veiled: bool) -> str:
    name = html.escape(f"{record.role}, {record.treatment}" if record.treatment else record.role)
    return f'<div><span class="role">{name}</span>{_frame(record, picture, veiled)}</div>'


def _frame(record: ImageRecord, picture: bytes | None, veiled: bool) -> str:
    if picture is None:
        return '<span class="frame waits">drawing</span>'
    told = html.escape(f"{record.role}: {record.prompt}, seed {record.seed}")
    small = ' class="small"' if max(record.width, record.height) <= SMALL else ""
    data = base64.b64encode(picture).decode()
    image = f'<img{small} alt="{told}" src="data:image/png;base64,{data}">'
    if not veiled:
        return f'<span class="frame">{image}</span>'
    click = f'<input type="checkbox" aria-label="Show this picture, {record.role}">'
    return f'<label class="frame veil">{click}{image}<span class="ask">click to show</span></label>'
