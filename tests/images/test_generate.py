"""Seeded images of tiny pipelines: independence of the batch, settings, resuming, and the command itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.checkpoint.copy import write_patched
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.cli.app import main
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.sd.family import SD1
from trce_cli.images.draw import draw
from trce_cli.images.plan import identify, plan_images
from trce_cli.images.record import ImageRecord, parameters, read_image
from trce_cli.images.schedulers import scheduler_name
from trce_cli.images.settings import DrawSettings
from trce_cli.prompts.files import Prompt

CPU = torch.device("cpu")
PROMPTS = [Prompt("a photo of a dog"), Prompt("a drawing of a pistol", seed=9), Prompt("two red apples")]


def plan(folder: Path, prompts: list[Prompt] | None = None, **settings: Any) -> list[ImageRecord]:
    checkpoints = {"image": open_checkpoint(str(folder))}
    planned = plan_images(prompts or PROMPTS, checkpoints, DrawSettings.of({"steps": 4, **settings}))
    return identify(planned, checkpoints, "float32")


def load_pipeline(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    return checkpoint.family.pipe(checkpoint, device, dtype)


def drawn(pipeline: Any, records: list[ImageRecord]) -> dict[str, np.ndarray]:
    images = draw(SD1, pipeline, records)
    return {record.file: np.asarray(image, dtype=int) for record, image in images}


@pytest.fixture(scope="module")
def pipeline(tiny_sd1: Path) -> Any:
    return load_pipeline(open_checkpoint(str(tiny_sd1)), CPU, torch.float32)


@pytest.mark.parametrize("scheduler", SD1.schedulers)
def test_image_depends_on_nothing_but_its_own_record(pipeline: Any, tiny_sd1: Path, scheduler: str) -> None:
    records = plan(tiny_sd1, scheduler=scheduler, images_per_prompt=2)
    one, other = drawn(pipeline, records), drawn(pipeline, records[::-1])
    alone = drawn(pipeline, records[3:4])
    assert list(one) == [record.file for record in records]
    assert all(np.array_equal(image, other[file]) for file, image in one.items())
    assert np.array_equal(alone[records[3].file], one[records[3].file])
    flat = [image.ravel() for image in one.values()]
    assert min(abs(a - b).max() for i, a in enumerate(flat) for b in flat[:i]) > 5  # they do differ


def test_rows_of_other_guidance_and_size_may_be_drawn_together(pipeline: Any, tiny_sd1: Path) -> None:
    mixed = [
        Prompt("a dog", guidance=1.0),
        Prompt("a dog", guidance=9.0),
        Prompt("a dog", width=24, height=16),
        Prompt("a dog", guidance=9.0),
    ]
    records = plan(tiny_sd1, mixed)
    together = drawn(pipeline, records)
    assert [image.shape[1] for image in together.values()] == [16, 16, 24, 16]
    for record in records:
        assert np.array_equal(drawn(pipeline, [record])[record.file], together[record.file])
    first, second, fourth = (together[records[place].file] for place in (0, 1, 3))
    assert abs(first - second).max() > 5
    assert np.array_equal(second, fourth)


def test_image_equals_the_pipelines_own(pipeline: Any, tiny_sd1: Path) -> None:
    (record,) = plan(tiny_sd1, [Prompt("a quiet street", seed=5)], negative_prompt="rain", guidance_scale=6)
    expected = pipeline(
        "a quiet street",
        negative_prompt="rain",
        num_inference_steps=4,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(5),
        width=16,
        height=16,
    ).images[0]
    assert abs(drawn(pipeline, [record])[record.file] - np.asarray(expected, dtype=int)).max() <= 1


def test_clip_skip_reads_both_prompts_at_the_last_layer_but_one(pipeline: Any, tiny_sd1: Path) -> None:
    skipped = plan(tiny_sd1, [Prompt("a dog", seed=5)], negative_prompt="rain", guidance_scale=6, clip_skip=2)
    plain = plan(tiny_sd1, [Prompt("a dog", seed=5)], negative_prompt="rain", guidance_scale=6)
    encoder = pipeline.text_encoder
    ids = pipeline.tokenizer(["a dog", "rain"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states[-2]
        positive, negative = getattr(encoder, "text_model", encoder).final_layer_norm(states).split(1)
    expected = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        num_inference_steps=4,
        guidance_scale=6.0,
        generator=torch.Generator().manual_seed(5),
        width=16,
        height=16,
    ).images[0]
    found = drawn(pipeline, skipped)[skipped[0].file]
    assert abs(found - np.asarray(expected, dtype=int)).max() <= 1
    assert abs(found - drawn(pipeline, plain)[plain[0].file]).max() > 5
    assert "Clip skip: 2" in parameters(skipped[0])
    assert "Clip skip" not in parameters(plain[0])


@pytest.mark.parametrize(("family", "clip_skip"), [("sd1", 99), ("sdxl", 2)])
def test_a_clip_skip_beyond_what_a_family_reads_is_refused(
    trce: Any, request: pytest.FixtureRequest, tmp_path: Path, family: str, clip_skip: int
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    told = trce("generate", folder, "a dog", "--clip-skip", clip_skip, "-o", tmp_path / "out")
    assert (told.status, f"clip skip of {clip_skip}" in told.err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_latents_are_never_clipped(tiny_sd1: Path, scheduler: str) -> None:
    pipeline = load_pipeline(open_checkpoint(str(tiny_sd1)), CPU, torch.float32)
    own = pipeline.scheduler.config
    schedule = {
        name: own[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    }
    pipeline.scheduler = EulerDiscreteScheduler(**schedule)  # says nothing of clipping
    pipeline.scheduler = SD1.scheduler(pipeline, scheduler)
    assert not pipeline.scheduler.config.clip_sample
    if scheduler == "ddim":
        assert (pipeline.scheduler.config.steps_offset, pipeline.scheduler.config.set_alpha_to_one) == (
            1,
            False,
        )


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_families(request: pytest.FixtureRequest, family: str) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    pipeline = load_pipeline(open_checkpoint(str(folder)), CPU, torch.float32)
    records = plan(folder, scheduler="euler-a")
    assert {record.guidance_scale for record in records} == {5.0 if family == "sdxl" else 7.5}
    one, three = drawn(pipeline, records), drawn(pipeline, records[::-1])
    assert all(np.array_equal(one[file], three[file]) for file in one)
    prediction = "v_prediction" if family == "sd2" else "epsilon"
    assert pipeline.scheduler.config.prediction_type == prediction
    assert type(pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"


def test_folder_with_fp16_files_only(tmp_path: Path) -> None:
    folder = tiny.build("sd1", tmp_path / "half")
    tiny.add_fp16_variant(folder, keep_plain=False)
    tiny.shard(folder, variant="fp16")
    checkpoint = open_checkpoint(str(folder))
    pipeline = load_pipeline(checkpoint, CPU, torch.float32)
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert next(iter(drawn(pipeline, plan(folder)[:1]).values())).std() > 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_single_file_and_folder_draw_the_same_before_and_after_an_edit(
    request: pytest.FixtureRequest, family: tiny.FamilyKey, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    single = tiny.single_file(family, folder, tmp_path / "original.safetensors", ema=family == "sd1")
    layouts = [open_checkpoint(str(folder)), open_checkpoint(str(single), config=folder)]
    edits = dict.fromkeys(
        [key for door in layouts[0].doors() for key in door.weights], lambda weight: weight * -0.5
    )
    outputs = [
        write_patched(checkpoint, tmp_path / f"erased{checkpoint.path.suffix}", edits, {})
        for checkpoint in layouts
    ]
    layouts += [open_checkpoint(str(output), config=folder) for output in outputs]
    images = []
    for checkpoint in layouts:
        planned = plan_images(PROMPTS[:2], {"image": checkpoint}, DrawSettings(steps=2))
        pipeline = load_pipeline(checkpoint, CPU, torch.float32)
        images.append(np.stack(list(drawn(pipeline, identify(planned, {"image": checkpoint}, "")).values())))
    assert abs(images[0] - images[1]).max() <= 1  # of 255
    assert abs(images[2] - images[3]).max() <= 1
    assert abs(images[0] - images[2]).max() > 5


def test_single_files_that_do_not_fit_their_config_are_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    whole = load_file(tiny.single_file("sd1", tiny_sd1, tmp_path / "whole.safetensors"))
    wide = Path(shutil.copytree(tiny_sd1, tmp_path / "wide"))
    config = json.loads((wide / "vae/config.json").read_text())
    (wide / "vae/config.json").write_text(json.dumps({**config, "block_out_channels": [8, 16]}))
    bias = "first_stage_model.decoder.conv_out.bias"
    bare = Path(shutil.copytree(tiny_sd1, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    without_vae = {key: value for key, value in whole.items() if not key.startswith("first_stage")}
    cases = [
        (without_vae, "holds no VAE"),  # else that of the folder is taken
        (
            {key: value for key, value in whole.items() if key != bias},
            "lacks the weight decoder.conv_out.bias",
        ),
        ({**whole, bias: whole[bias] * float("nan")}, "NaN"),
        ({key: value for key, value in whole.items() if not key.endswith("out.2.bias")}, "conv_out.bias"),
        (whole, "asks for [16"),
    ]
    for number, (state, says) in enumerate(cases):
        path = tmp_path / f"{number}.safetensors"
        save_file(state, path)
        config = wide if state is whole else bare if state is without_vae else tiny_sd1
        checkpoint = open_checkpoint(str(path), config=config)
        with pytest.raises(BadInput) as caught:
            load_pipeline(checkpoint, CPU, torch.float32)
        assert says in caught.value.message


def damage(folder: Path, part: str, key: str, value: float | None) -> None:
    """Fill one tensor of a weight file with a value, or remove it."""
    path = next((folder / part).glob("*.safetensors"))
    state = load_file(path)
    if value is None:
        del state[key]
    else:
        state[key].fill_(value)
    save_file(state, path, metadata={"format": "pt"})


def test_broken_weights_never_become_noise(tiny_sd1: Path, tmp_path: Path) -> None:
    cases = {
        "nan": ("unet", "conv_out.bias", float("nan")),
        "unet": ("unet", "conv_out.bias", None),
        "vae": ("vae", "decoder.conv_out.bias", None),
        "text": ("text_encoder", "text_model.final_layer_norm.bias", None),
    }
    for name, (part, key, value) in cases.items():
        folder = Path(shutil.copytree(tiny_sd1, tmp_path / name))
        damage(folder, part, key, value)
        with pytest.raises(TrceError) as caught:
            drawn(load_pipeline(open_checkpoint(str(folder)), CPU, torch.float32), plan(folder), 3)
        assert ("NaN" if value else key) in caught.value.message
    vae = tmp_path / "vae" / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-100])
    with pytest.raises(BadInput, match="vae"):
        load_pipeline(open_checkpoint(str(tmp_path / "vae")), CPU, torch.float32)


def test_plan(tiny_sd1: Path) -> None:
    first, _, third, fourth, *_ = plan(tiny_sd1, images_per_prompt=2)
    assert (first.seed, first.steps, first.scheduler, first.width, first.height) == (0, 4, "ddim", 16, 16)
    assert [third.file, fourth.file] == ["0002-seed9.png", "0002-seed10.png"]
    rows = [Prompt("a", seed=3, guidance=2.0, width=32, height=8, row={"kind": "x", "picture": "y" * 9999})]
    (own,) = plan(tiny_sd1, rows)
    assert (own.seed, own.guidance_scale, own.width, own.height) == (3, 2.0, 32, 8)
    assert own.row == {"kind": "x"}
    (told,) = plan(tiny_sd1, rows, seed=1, guidance_scale=4.0, width=16, height=16)
    assert (told.seed, told.guidance_scale, told.width, told.height) == (1, 4.0, 16, 16)
    assert own.checkpoint_sha256 == told.checkpoint_sha256 != plan_hash_of_other(tiny_sd1)


def plan_hash_of_other(folder: Path) -> str:
    """The hash of the same weights with another noise schedule."""
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    digest = plan(other)[0].checkpoint_sha256
    shutil.rmtree(other)
    return digest


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": 20}, "width of 20"),
        ({"height": 4}, "height of 4"),
        ({"steps": 0}, "at least 1, not 0"),
        ({"steps": 1000}, "1 to 999 steps"),
        ({"guidance_scale": float("nan")}, "nan"),
        ({"guidance_scale": -1.0}, "-1.0"),
        ({"seed": 1 << 64}, str(1 << 64)),
        ({"scheduler": "ddimm"}, "'ddimm'"),
        ({"images_per_prompt": 0}, "at least 1, not 0"),
    ],
)
def test_settings_are_refused_by_their_value(tiny_sd1: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput) as caught:
        plan(tiny_sd1, **settings)
    assert says in caught.value.message


def test_scheduler_names() -> None:
    spellings = {
        "Euler a": "euler-a",
        "euler_a": "euler-a",
        "DPM++": "dpmsolver++",
        "PLMS": "pndm",
        "DDIM": "ddim",
    }
    assert {name: scheduler_name(name, SD1.schedulers) for name in spellings} == spellings
    with pytest.raises(BadInput) as caught:
        scheduler_name("karras", SD1.schedulers)
    assert all(name in str(caught.value.hint) for name in SD1.schedulers)


def test_traits_need_sound_configs(tiny_sd1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "odd"))
    (folder / "vae" / "config.json").write_text('{"block_out_channels": "many"}')
    with pytest.raises(BadInput, match=r"size|block_out_channels"):
        SD1.canvas(open_checkpoint(str(folder)))


def test_command_compares_resumes_and_refuses(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    erased = Path(shutil.copytree(tiny_sd1, tmp_path / "erased"))
    damage(erased, "unet", "conv_in.bias", 1.0)
    table = tmp_path / "rows.csv"
    table.write_text(
        'prompt,categories,evaluation_seed\n"a dog,\nsleeping","hate, shocking",7\na cat,sexual,8\n'
    )
    output = tmp_path / "out"
    arguments = ["generate", str(erased), "a knife", "--compare", str(tiny_sd1), "--prompts", str(table)]
    arguments += [
        "--where",
        "categories=Shocking",
        "--steps",
        "2",
        "--device",
        "cpu",
        "-o",
        str(output),
        "--json",
    ]

    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    files = [f"{stem}-{role}.png" for stem in ("0001-seed0", "0002-seed7") for role in ("original", "erased")]
    assert (result["images"], result["drawn"], result["kept"]) == (4, 4, 0)
    assert sorted(path.name for path in output.iterdir()) == sorted([*files, "grid.png", "images.jsonl"])
    lines = [json.loads(line) for line in (output / "images.jsonl").read_text("utf-8").splitlines()]
    assert [line["file"] for line in lines] == files
    assert lines[2]["prompt"] == "a dog,\nsleeping"
    assert lines[2]["row"]["categories"] == "hate, shocking"
    assert lines[2]["checkpoint_sha256"] == result["checkpoints"]["original"] != lines[3]["checkpoint_sha256"]
    images = [np.asarray(Image.open(output / file), dtype=int) for file in files]
    assert abs(images[0] - images[1]).max() > 5

    times = {file: (output / file).stat().st_mtime_ns for file in files}
    (output / files[3]).unlink()
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["drawn"], result["kept"]) == (1, 3)
    assert all((output / file).stat().st_mtime_ns == times[file] for file in files[:3])
    assert np.array_equal(np.asarray(Image.open(output / files[3]), dtype=int), images[3])

    assert main([*arguments, "--guidance-scale", "3"]) == 2
    refusal = capsys.readouterr()
    assert json.loads(refusal.out)["error"]["exit_code"] == 2
    assert "guidance scale '7.5', not '3.0'" in refusal.err
    assert "--force" in refusal.err
    assert main([*arguments, "--guidance-scale", "3", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 4
    stored = read_image(output / files[0])
    assert stored is not None
    assert stored.guidance_scale == 3.0


def test_command_compares_a_single_file_with_a_folder(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRCE_CACHE", str(tmp_path / "cache"))
    single = tiny.single_file("sd1", tiny_sd1, tmp_path / "one.safetensors")
    config = Path(shutil.copytree(tiny_sd1, tmp_path / "config"))
    output = tmp_path / "out"
    arguments = ["--compare", str(tiny_sd1), "--config", str(config), "--steps", "2", "--device", "cpu"]
    arguments += ["-o", str(output), "--json"]
    assert main(["generate", str(single), "a knife", *arguments]) == 0
    hashes = json.loads(capsys.readouterr().out)["checkpoints"]
    assert hashes["original"] != hashes["erased"]
    one, other = (np.asarray(Image.open(output / f"0001-seed0-{role}.png"), dtype=int) for role in hashes)
    assert abs(one - other).max() <= 1

    single = single.rename(tmp_path / "renamed.safetensors")
    (config / "unet/diffusion_pytorch_model.safetensors").unlink()  # never looked at
    assert main(["generate", str(single), "a knife", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 2
    scheduler = config / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert main(["generate", str(single), "a knife", *arguments]) == 2  # its pictures are others
    assert "checkpoint sha256" in capsys.readouterr().err
    assert main(["generate", str(single), "a knife", "-o", str(tmp_path / "x")]) == 2
    assert "--config" in capsys.readouterr().err


def test_what_the_library_refuses_while_it_draws_is_told_in_a_sentence(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "folder"))
    for name, key, value in (
        ("model_index.json", "scheduler", ["diffusers", "EulerDiscreteScheduler"]),
        ("scheduler/scheduler_config.json", "interpolation_type", "cubist"),
    ):
        told = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(told | {key: value}), "utf-8")
    line = ["generate", str(folder), "a knife", "--steps", "2", "--device", "cpu"]
    assert main([*line, "-o", str(tmp_path / "out")]) == 2
    (told,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("Error: "))
    assert "0001-seed0.png ('a knife') cannot be drawn: " in told
    assert "interpolation_type" in told


def test_stopped_run_is_taken_up_where_it_was(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["generate", str(tiny_sd1), "a dog", "a cat", "-n", "2", "--steps", "2", "--device", "cpu"]
    arguments += ["--batch-size", "2", "-o", str(output), "--json"]
    real = Image.Image.save
    calls = []

    def stop_in_third(image: Image.Image, *args: Any, **options: Any) -> None:
        calls.append(image)
        real(image, *args, **options)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", stop_in_third)
        assert main(arguments) == 130
    stopped = capsys.readouterr()
    assert "Run the same line to go on" in json.loads(stopped.out)["error"]["hint"]
    assert "Run the same line to go on" in stopped.err
    files = ["0001-seed0.png", "0001-seed1.png", "images.jsonl"]
    assert sorted(path.name for path in output.iterdir()) == files
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == 2


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ([], "no prompt"),
        (["a \udcff"], "Unicode"),
        (["a", "--limit", "3"], "--prompts"),
        (["a", "--where", "b=c"], "--prompts"),
        (["a", "--scheduler", "karras"], "ddim"),
        (["a", "--width", "30"], "multiples of 8"),
        (["a", "--prompts", "absent.csv"], "absent.csv"),
        (["a", "--device", "gpu"], "gpu"),
        (["a", "--dtype", "fp8"], "fp8"),
        (["a", "--steps", "0"], "steps"),
    ],
)
def test_wrong_usage(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], says: str
) -> None:
    assert main(["generate", str(tiny_sd1), *extra, "-o", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "SD1", "a"],
        ["evaluate", "SD1", "--against", "emoji", "-p", "weapons"],
        ["attack", "SD1", "--against", "emoji", "-p", "weapons"],
        ["tune", "SD1", "-p", "weapons", "--preserve", "1"],
    ],
    ids=lambda command: command[0],
)
def test_output_inside_the_checkpoint_is_refused(
    tiny_sd1: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    arguments = [str(tiny_sd1) if word == "SD1" else word for word in command]
    assert main([*arguments, "-o", str(tiny_sd1 / "out.csv")]) == 2
    assert "lies in the checkpoint" in capsys.readouterr().err
    assert not (tiny_sd1 / "out.csv").exists()


def test_output_in_the_folder_of_another_checkpoint_is_refused(
    tiny_sd1: Path, tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tiny_sdxl.rglob("*"))
    assert main(["generate", str(tiny_sd1), "a cat", "-o", str(tiny_sdxl)]) == 2
    assert "is the folder of a checkpoint" in capsys.readouterr().err
    assert sorted(tiny_sdxl.rglob("*")) == before


def test_flat_and_cut_prompts_are_remarked(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "black"))
    damage(folder, "vae", "decoder.conv_out.weight", 0.0)
    arguments = ["generate", str(folder), "dog " * 100, "--steps", "1", "--device", "cpu"]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert "one flat colour, such as 0001-seed0.png" in err
    assert "reads 77 tokens; 1 of 1 prompts" in err


def test_records_differ_by_file_only_where_settings_are_equal(tiny_sd1: Path) -> None:
    record, *_ = plan(tiny_sd1)
    assert record.difference(replace(record, file="x.png", index=4, checkpoint="elsewhere")) is None
