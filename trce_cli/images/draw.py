"""Seeded images: each depends only on its checkpoint, prompt, seed and settings, never on its batch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from trce_cli.checkpoint.checkpoint import Checkpoint, read_json
from trce_cli.errors import BadInput, TrceError, first_line
from trce_cli.images.folder import ImageFolder, ImageRecord
from trce_cli.prompts.files import MAX_SEED, Prompt
from trce_cli.system.memory import free
from trce_cli.system.safetensors import hash_file

if TYPE_CHECKING:  # planning needs none of them, so a wrong setting is refused at once
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

# Names that users know -> diffusers' classes.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
ALIASES = {
    "dpm": "dpmsolver++",
    "dpm++": "dpmsolver++",
    "dpm++-2m": "dpmsolver++",
    "dpmsolver": "dpmsolver++",
    "euler-ancestral": "euler-a",
    "plms": "pndm",
}
STEPS = 50  # diffusers' default for every family, and the one of the I2P evaluations
GUIDANCE = {"sd1": 7.5, "sd2": 7.5, "sdxl": 5.0}  # diffusers' defaults
ROW_CELL = 1000  # characters; longer cells of a prompt's row (a picture, say) are not recorded


@dataclass(frozen=True)
class Settings:
    """How to draw; None leaves it to the prompt's own row, and where that is silent to the checkpoint."""

    seed: int | None = None
    steps: int = STEPS
    guidance_scale: float | None = None
    negative_prompt: str = ""
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    images_per_prompt: int = 1


def plan_images(
    prompts: Sequence[Prompt],
    checkpoints: Mapping[str, Checkpoint],
    settings: Settings,
) -> list[ImageRecord]:
    """What to draw: every prompt with `images_per_prompt` seeds, counted up from its own, by all checkpoints.

    `checkpoints` are keyed by role; the last one gives the defaults, so that all draw with the same settings.
    Reads configs only and leaves dtype and hash for `identify`. Raises BadInput for settings that one of the
    checkpoints cannot draw.
    """
    if not prompts:
        raise BadInput("There is no prompt.", "Give prompts as arguments, or a file with --prompts.")
    check(settings, prompts)
    all_traits = {role: traits(checkpoint) for role, checkpoint in checkpoints.items()}
    *_, (last, own) = all_traits.items()
    usual_guidance = GUIDANCE[checkpoints[last].family.key]
    scheduler = own.scheduler if settings.scheduler is None else scheduler_name(settings.scheduler)
    records = []
    for index, prompt in enumerate(prompts, start=1):
        width = first(settings.width, prompt.width, own.width)
        height = first(settings.height, prompt.height, own.height)
        guidance = first(settings.guidance_scale, prompt.guidance, usual_guidance)
        for role, trait in all_traits.items():
            trait.check(width, height, settings.steps, f"Prompt {index}", checkpoints[role].name)
        for offset in range(settings.images_per_prompt):
            seed = (first(settings.seed, prompt.seed, 0) + offset) & MAX_SEED
            for role, checkpoint in checkpoints.items():
                suffix = "" if len(checkpoints) == 1 else f"-{role}"
                record = ImageRecord(
                    file=f"{index:04d}-seed{seed}{suffix}.png",
                    index=index,
                    role=role,
                    prompt=prompt.text,
                    seed=seed,
                    steps=settings.steps,
                    guidance_scale=float(guidance),
                    scheduler=scheduler,
                    width=width,
                    height=height,
                    dtype="",
                    checkpoint=checkpoint.name,
                    checkpoint_sha256="",
                    negative_prompt=settings.negative_prompt,
                    row={name: cell for name, cell in prompt.row.items() if len(cell) <= ROW_CELL},
                )
                records.append(record)
    return records


def identify(
    records: Sequence[ImageRecord],
    checkpoints: Mapping[str, Checkpoint],
    dtype: str,
    report: Callable[[int], None] = lambda count: None,
) -> list[ImageRecord]:
    """The plan with dtype and checkpoint hashes; `report` is called after each of the `pixel_files`."""
    hashes = {role: checkpoint_hash(checkpoint, report) for role, checkpoint in checkpoints.items()}
    return [replace(record, dtype=dtype, checkpoint_sha256=hashes[record.role]) for record in records]


def pixel_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files that a picture depends on, by relative name: weights, tokenizers and configs."""
    encoders = [part for spec in checkpoint.family.encoders for part in (spec.folder, spec.tokenizer)]
    parts = ("unet", "vae", "scheduler", *encoders)
    if checkpoint.layout == "diffusers":
        return checkpoint_files(checkpoint, *parts)
    beside = [path for part in parts for path in checkpoint.config_folder.glob(f"{part}/*")]
    texts = {f"{path.parent.name}/{path.name}": path for path in beside if path.suffix in (".json", ".txt")}
    return {"checkpoint.safetensors": checkpoint.path, **texts}  # by whatever name the file goes


def check(settings: Settings, prompts: Sequence[Prompt]) -> None:
    """Raise BadInput for prompts and values that no checkpoint can draw with."""
    for text in (settings.negative_prompt, *(prompt.text for prompt in prompts)):
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text in its encoding
            raise BadInput(f"The prompt {text[:60]!r} is no valid Unicode.", "Give it as UTF-8.") from None
    if settings.seed is not None and not 0 <= settings.seed <= MAX_SEED:
        raise BadInput(f"The seed {settings.seed} is not between 0 and {MAX_SEED}.")
    if settings.images_per_prompt < 1:
        raise BadInput(f"{settings.images_per_prompt} images a prompt are none.", "Give at least 1.")
    guidance = settings.guidance_scale
    if guidance is not None and not 0 <= guidance < math.inf:
        raise BadInput(f"The guidance scale {guidance} is no number from 0 up.")


def checkpoint_files(checkpoint: Checkpoint, *parts: str) -> dict[str, Path]:
    """The checkpoint's files in the folders of these parts, by relative name."""
    return {name: path for name, path in checkpoint.files.items() if name.partition("/")[0] in parts}


def checkpoint_hash(checkpoint: Checkpoint, report: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 in hex over the names and hashes of `pixel_files`."""
    digest = sha256()
    for name, path in sorted(pixel_files(checkpoint).items()):
        digest.update(f"{name} {hash_file(path)}\n".encode())
        report(1)
    return digest.hexdigest()


def scheduler_name(name: str) -> str:
    """A scheduler's canonical name from any spelling; BadInput with all names for an unknown one."""
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    key = ALIASES.get(key, key)
    if key not in SCHEDULERS:
        raise BadInput(f"There is no scheduler {name!r}.", f"Schedulers: {', '.join(SCHEDULERS)}.")
    return key


@dataclass(frozen=True)
class Traits:
    """What a checkpoint's configs say about drawing with it."""

    width: int  # pixels, as it was trained
    height: int
    multiple: int  # of which a picture's sides must be
    max_steps: int
    scheduler: str  # its short name, or its class for one without

    def check(self, width: int, height: int, steps: int, who: str, checkpoint: str) -> None:
        """Raise BadInput where the checkpoint cannot draw this size in so many steps."""
        for side, pixels in (("width", width), ("height", height)):
            if pixels < 1 or pixels % self.multiple:
                raise BadInput(
                    f"{who} has a {side} of {pixels}; {checkpoint} draws multiples of {self.multiple}.",
                    f"Its own size is {self.width}x{self.height}; see --width and --height.",
                )
        if not 1 <= steps <= self.max_steps:
            raise BadInput(f"{checkpoint} draws in 1 to {self.max_steps} steps, not in {steps}.")


def traits(checkpoint: Checkpoint) -> Traits:
    """Size, steps and scheduler from the checkpoint's configs, without its weights."""
    model_index = read_json(checkpoint.config_folder / "model_index.json")
    vae = read_json(checkpoint.config_folder / "vae/config.json")
    scheduler = read_json(checkpoint.config_folder / "scheduler/scheduler_config.json")
    blocks, sample = vae.get("block_out_channels"), checkpoint.unet_config.get("sample_size")
    size = sample if isinstance(sample, list) else [sample, sample]
    steps, entry = scheduler.get("num_train_timesteps", 1000), model_index.get("scheduler")
    counts = all(type(number) is int and number > 0 for number in (*size, steps))
    if not counts or not isinstance(blocks, list) or not blocks:
        raise BadInput(f"The configs of {checkpoint.name} do not say what size of picture it draws.")
    if not isinstance(entry, list) or not isinstance(entry[-1], str):
        raise BadInput(f"The model_index.json of {checkpoint.name} names no scheduler.")
    factor = 2 ** (len(blocks) - 1)  # pixels a latent
    short = {class_name: short for short, class_name in SCHEDULERS.items()}
    return Traits(
        width=size[-1] * factor,
        height=size[0] * factor,
        multiple=math.lcm(8, factor),  # diffusers' pipelines insist on 8
        max_steps=steps - 1,  # SD's schedules begin at 1, and end before the last
        scheduler=short.get(entry[-1], entry[-1]),
    )


def default_dtype(device: "torch.device") -> str:
    """float16 on CUDA, as published checkpoints are run there, else float32."""
    return "float16" if device.type == "cuda" else "float32"


def load_pipeline(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "DiffusionPipeline":
    """The checkpoint's diffusers pipeline on a device, in `dtype`, without safety checker or watermark.

    Reads safetensors only and never the network. Raises BadInput for weights that are missing or damaged. The
    autoencoder decodes one image at a time, which bounds the memory.
    """
    import diffusers
    import transformers

    from trce_cli.families.sd.denoiser import load_unet

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    pipeline_class = getattr(diffusers, checkpoint.family.pipeline)
    specs = checkpoint.family.encoders
    # Loaded by ourselves: transformers leaves text encoder weights that it does not find at random values.
    parts = dict(zip((s.folder for s in specs), checkpoint.load_text_encoders(device, dtype), strict=True))
    if checkpoint.family.pooled:
        parts |= {"add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if checkpoint.layout == "single-file":  # its config folder may be another checkpoint, with its weights
        parts |= {"unet": load_unet(checkpoint, device, dtype), "vae": load_vae(checkpoint, device, dtype)}
    try:
        pipeline = pipeline_class.from_pretrained(
            checkpoint.config_folder,
            dtype=dtype,
            variant=weight_variant(checkpoint),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=True,  # leaves what is missing on the meta device instead of at random values
            **parts,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition(". ")[0].rstrip(".")
        raise BadInput(f"{checkpoint.name} cannot be loaded: {reason}.") from error
    for part in ("unet", "vae"):
        if absent := [key for key, weight in getattr(pipeline, part).named_parameters() if weight.is_meta]:
            raise BadInput(
                f"{checkpoint.name} lacks {len(absent)} weights of its {part}, such as {absent[0]}."
            )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    return pipeline.to(device)


def load_vae(checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype") -> "AutoencoderKL":
    """The autoencoder of a single file; BadInput where it does not fit its config or is not finite."""
    import torch
    from diffusers import AutoencoderKL

    from trce_cli.checkpoint.convert import vae_of_single_file

    where = checkpoint.config_folder / "vae/config.json"
    try:
        with torch.device("meta"):
            vae = AutoencoderKL.from_config(read_json(where))
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{where} cannot be used: {first_line(error)}") from error
    found, state = vae_of_single_file(checkpoint), {}
    for key, parameter in vae.named_parameters():
        if key not in found:
            raise BadInput(f"The VAE of {checkpoint.path} lacks the weight {key} that {where} asks for.")
        if found[key].shape != parameter.shape:
            raise BadInput(
                f"{key} of the VAE in {checkpoint.path} has shape {list(found[key].shape)}; "
                f"{where} asks for {list(parameter.shape)}."
            )
        weight = found[key].make()
        if not bool(weight.isfinite().all()):
            raise BadInput(f"{key} of the VAE in {checkpoint.path} holds NaN or infinite values.")
        state[key] = weight.to(device, dtype)
    vae.load_state_dict(state, assign=True)
    return vae.eval()


def weight_variant(checkpoint: Checkpoint) -> str | None:
    """The variant asked for, else that of the first part without plain weight files ("fp16"), else None."""
    if checkpoint.variant:
        return checkpoint.variant
    for part in ("unet", "vae"):
        names = [path.name for path in checkpoint_files(checkpoint, part).values()]
        dotted = [name.split(".") for name in names if name.endswith(".safetensors")]
        if dotted and all(len(pieces) > 2 for pieces in dotted):
            return dotted[0][1].partition("-")[0]  # "model.fp16-00001-of-00002.safetensors"
    return None


def draw(
    pipeline: "DiffusionPipeline", records: Sequence[ImageRecord], batch_size: int
) -> Iterator[tuple[ImageRecord, Image.Image]]:
    """Draw the records, those with equal settings in batches, and yield each with its image.

    Every image has a CPU generator of its own, from which its latents are drawn in float32 and then whatever
    noise its scheduler asks for. Raises TrceError when an image is not finite, as fp16 overflow makes it.
    """
    batches: dict[tuple[Any, ...], list[ImageRecord]] = {}
    for record in records:
        key = (record.scheduler, record.steps, record.guidance_scale, record.width, record.height)
        batches.setdefault((*key, bool(record.negative_prompt)), []).append(record)
    for alike in batches.values():
        set_scheduler(pipeline, alike[0].scheduler)
        for start in range(0, len(alike), batch_size):
            yield from draw_batch(pipeline, alike[start : start + batch_size])


def draw_batch(
    pipeline: "DiffusionPipeline", records: Sequence[ImageRecord]
) -> list[tuple[ImageRecord, Image.Image]]:
    """Draw records of equal settings at once; see `draw`."""
    import numpy as np
    import torch

    head = records[0]
    generators = [torch.Generator("cpu").manual_seed(record.seed) for record in records]
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, head.height // factor, head.width // factor)
    latents = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    pictures = pipeline(  # (batch, height, width, channels) within [0, 1]
        [record.prompt for record in records],
        # Without one the pipeline is left to its default, which for SDXL is not the empty prompt's embedding.
        negative_prompt=[record.negative_prompt for record in records] if head.negative_prompt else None,
        num_inference_steps=head.steps,
        guidance_scale=head.guidance_scale,
        width=head.width,
        height=head.height,
        generator=generators,
        latents=latents.to(pipeline.unet.device, pipeline.unet.dtype),
        output_type="np",
    ).images
    drawn = []
    for record, picture in zip(records, pictures, strict=True):
        if not np.isfinite(picture).all():
            fix = "The weights may be damaged; try another checkpoint."
            if record.dtype != "float32":
                fix = f"{record.dtype} may be too coarse here: try --dtype fp32, with another --output."
            raise TrceError(f"{record.file} ({record.prompt[:60]!r}) came out as NaN or infinity.", fix)
        drawn.append((record, Image.fromarray((picture * 255).round().astype(np.uint8))))
    return drawn


def set_scheduler(pipeline: "DiffusionPipeline", name: str) -> None:
    """Give the pipeline the scheduler of that name, with its own noise schedule and prediction type."""
    import diffusers

    wanted = SCHEDULERS.get(name, name)
    if type(pipeline.scheduler).__name__ == wanted:
        return
    config = pipeline.scheduler.config
    plain: dict[str, Any] = {}
    if name == "pndm":
        plain = {"skip_prk_steps": True}  # PLMS as in SD's configs: no warm-up steps
    elif name in ("ddim", "ddpm"):
        # Where the config comes from another scheduler, their defaults are those of models of pixels.
        plain = {"clip_sample": False}
        if name == "ddim" and not hasattr(pipeline, "text_encoder_2"):
            plain |= {"steps_offset": 1, "set_alpha_to_one": config.get("set_alpha_to_one", False)}
    pipeline.scheduler = getattr(diffusers, wanted).from_config(config, **plain)


def draw_missing(
    checkpoints: Mapping[str, Checkpoint],
    folder: ImageFolder,
    device: "torch.device",
    batch_size: int,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[ImageRecord, Image.Image]]:
    """Draw and write the folder's missing images, one role and pipeline after the other, and yield each."""
    import torch

    for role, checkpoint in checkpoints.items():
        missing = [record for record in folder.missing if record.role == role]
        if not missing:
            continue
        pipeline = load_pipeline(checkpoint, device, getattr(torch, missing[0].dtype))
        if cut := count_truncated(pipeline, missing):
            limit = pipeline.tokenizer.model_max_length
            note(
                f"{checkpoint.name} reads {limit} tokens; {cut} of {len(missing)} prompts are longer and cut."
            )
        for record, image in draw(pipeline, missing, batch_size):
            folder.add(record, image)
            yield record, image
        del pipeline
        free(device)
    folder.write_index()


def count_truncated(pipeline: "DiffusionPipeline", records: Sequence[ImageRecord]) -> int:
    """How many of the prompts have more tokens than the text encoder reads."""
    tokens = pipeline.tokenizer([record.prompt for record in records], truncation=False).input_ids
    return sum(len(ids) > pipeline.tokenizer.model_max_length for ids in tokens)


def is_flat(image: Image.Image) -> bool:
    """Whether every pixel has the same colour, which hints at a broken checkpoint or dtype."""
    return image.getcolors(1) is not None


def first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
