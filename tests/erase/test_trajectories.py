import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import toy
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.erase import sampling
from trce_cli.erase.prepare import prepare
from trce_cli.erase.prior import Prior
from trce_cli.erase.sampling import Predictor
from trce_cli.erase.settings import Recipe
from trce_cli.erase.trajectories import plan_trajectories
from trce_cli.erase.trajectory_set import TrajectorySet, identify
from trce_cli.errors import BadInput
from trce_cli.families.base import EMPTY
from trce_cli.families.clip import models
from trce_cli.prompts.presets import load_preset

RECIPE = Recipe(
    steps=4,
    early_steps=2,
    trajectories_per_concept=2,
    unconditional=6,
    benign=5,
    guidance_scale=3,
    steering_guidance=5,
)
PRIOR = Prior(
    "test",
    ("a fish beside a pig", "a watermelon"),
    ("a dog in the garden", "two red apples on a plate", "a cat on a chair"),
)
WORDS = ("harbour", "lamp")
TEMPLATES = 'templates = ["{}", "a photo of {}", "{} on the kitchen table"]\n'


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "toy.toml"
    path.write_text(toy.preset(head=TEMPLATES))
    return load_preset(path)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def identity(teacher, erased, preset, recipe=RECIPE):
    return identify(teacher, erased, [preset], recipe, "no", erased.hashes())


class Made:
    """A prepared set, and how many samples each model evaluated for it."""

    def __init__(self, checkpoint, preset, folder, accelerator, recipe=RECIPE):
        self.plan = plan_trajectories(checkpoint, [preset], PRIOR, recipe, WORDS)
        self.identity = identity(checkpoint, checkpoint, preset, recipe)
        self.set = TrajectorySet(folder, self.plan, self.identity)
        self.denoiser = checkpoint.family.denoise(checkpoint)
        self.conditioning = self.denoiser.condition(self.plan.prompts, torch.device("cpu"))
        self.samples = {"teacher": 0, "stage 1": 0}
        self.done = sum(
            prepare(
                self.set,
                accelerator,
                self.denoiser.schedule(recipe.steps),
                lambda: self._count("teacher"),
                lambda: self._count("stage 1"),
            )
        )

    def _count(self, name):
        unet = self.denoiser.load(torch.device("cpu"))

        def count(module, inputs):
            self.samples[name] += len(inputs[0])

        unet.register_forward_pre_hook(count)
        return Predictor(self.denoiser, unet, self.conditioning)


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def made(request, preset, accelerator, tmp_path_factory):
    folder = request.getfixturevalue(f"tiny_{request.param}")
    checkpoint = open_checkpoint(str(folder))
    return Made(checkpoint, preset, tmp_path_factory.mktemp("set"), accelerator), folder


@pytest.fixture(scope="module")
def sd1(preset, accelerator, tiny_sd1, tmp_path_factory):
    return Made(open_checkpoint(str(tiny_sd1)), preset, tmp_path_factory.mktemp("set"), accelerator)


class Naive:
    """DDIM written out with a whole diffusers pipeline in memory, one sample at a time."""

    def __init__(self, folder):
        from diffusers import DiffusionPipeline

        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        scheduler = self.pipeline.scheduler
        self.alphas = scheduler.alphas_cumprod.double()
        self.v = scheduler.config.prediction_type == "v_prediction"
        self.timesteps = [751, 501, 251, 1]  # 4 leading steps with an offset of 1

    def prediction(self, z, t, prompt):
        embeddings = self.pipeline.encode_prompt(
            prompt=prompt or "a cat", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        context, extra = embeddings[0] if prompt else embeddings[1], None
        if len(embeddings) == 4:
            pooled = embeddings[2] if prompt else embeddings[3]
            extra = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
        with torch.no_grad():
            return self.pipeline.unet(
                z.float()[None], t, encoder_hidden_states=context, added_cond_kwargs=extra
            ).sample[0].double()  # fmt: skip

    def next(self, z, step, prediction):
        t = self.timesteps[step]
        a = self.alphas[t]
        b = self.alphas[t - 250] if t > 250 else self.alphas[0]
        if self.v:
            x0, noise = a**0.5 * z - (1 - a) ** 0.5 * prediction, a**0.5 * prediction + (1 - a) ** 0.5 * z
        else:
            x0, noise = (z - (1 - a) ** 0.5 * prediction) / a**0.5, prediction
        return b**0.5 * x0 + (1 - b) ** 0.5 * noise

    def guided(self, z, step, prompt, guidance):
        t = self.timesteps[step]
        uncond, cond = self.prediction(z, t, ""), self.prediction(z, t, prompt)
        return self.next(z, step, uncond + guidance * (cond - uncond))


def noise(trajectory, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(trajectory.seed)).double()


def close(found, wanted, tolerance=4e-3):
    wanted = wanted.to(torch.float32)
    return (found.float() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_states_and_targets_equal_a_naive_computation(made):
    made, folder = made
    naive = Naive(folder)
    shape = made.plan.shape
    shard = made.plan.of("unsafe")[0]
    states = made.set.read(shard)
    for number in (0, 3):
        trajectory = shard.trajectories[number]
        z = noise(trajectory, shape)
        for step in range(2):
            row = number * 2 + step
            t = naive.timesteps[step]
            e_uncond, e_unsafe, e_safe = (
                naive.prediction(z, t, prompt) for prompt in ("", trajectory.prompt, trajectory.safe)
            )
            prefer = e_safe + 5 * (e_safe - e_uncond)
            reject = e_unsafe + 5 * (e_unsafe - e_uncond)
            assert states["timesteps"][row] == t  # of the state before the step
            assert close(states["latents"][row], z)
            assert close(states["direction"][row], prefer - reject)
            offset = (prefer**2 - reject**2).mean()
            assert states["offset"][row] == pytest.approx(float(offset), rel=0.02, abs=1e-4)
            assert made.conditioning.prompts[states["rows"][row]] == trajectory.prompt
            z = naive.guided(z, step, trajectory.prompt, 3)


def test_other_trajectories_are_kept_at_their_one_state(made):
    made, folder = made
    naive = Naive(folder)
    for kind in ("unconditional", "benign", "benign-check"):
        shard = made.plan.of(kind)[0]
        states = made.set.read(shard)
        row = len(shard.trajectories) - 1  # the longest
        trajectory = shard.trajectories[row]
        z = noise(trajectory, made.plan.shape)
        for step in range(trajectory.first):
            if kind == "unconditional":  # needs no guidance
                z = naive.next(z, step, naive.prediction(z, naive.timesteps[step], ""))
            else:
                z = naive.guided(z, step, trajectory.prompt, 3)
        assert states["timesteps"][row] == naive.timesteps[trajectory.first]
        assert close(states["latents"][row], z)
        if kind == "unconditional":
            stage1 = made.set.read(made.plan.of("stage1")[0])["prediction"][row]
            wanted = naive.prediction(states["latents"][row], naive.timesteps[trajectory.first], "")
            assert close(stage1, wanted)
        else:  # what the original predicts there under that caption
            wanted = naive.prediction(
                states["latents"][row], naive.timesteps[trajectory.first], trajectory.prompt
            )
            assert close(states["prediction"][row], wanted)


def test_nothing_is_computed_that_is_not_kept(made):
    made, _ = made
    assert made.samples == made.plan.evaluations
    plan = made.plan
    early = 2 * (plan.states("unsafe") + plan.states("unsafe-check"))  # what sampling with guidance takes
    safe = plan.states("unsafe") + plan.states("unsafe-check")
    single = sum(t.first for k in ("unconditional", "unconditional-check") for t in plan.trajectories[k])
    benign = [t for kind in ("benign", "benign-check") for t in plan.trajectories[kind]]
    guided = sum(2 * t.first + 1 for t in benign)  # and what is held there
    assert made.samples["teacher"] == early + safe + single + guided
    assert made.done == sum(len(shard.trajectories) for shard in plan.shards)


def test_the_empty_prompt_is_what_the_pipeline_guides_away_from(made):
    made, folder = made
    context = made.conditioning.streams["context"][0]
    assert made.conditioning.prompts[0] == EMPTY
    assert bool((context == 0).all()) == folder.name.startswith("sdxl")


def test_embeddings_do_not_depend_on_the_batch(made):
    made, _ = made
    prompt = made.plan.prompts[-1]
    alone = made.denoiser.condition([prompt], torch.device("cpu")).streams["context"]
    row = made.conditioning.rows([prompt])[0]
    assert torch.allclose(alone[1], made.conditioning.streams["context"][row], atol=1e-5)


def test_states_do_not_depend_on_how_many_are_sampled_at_once(sd1, preset, accelerator, tiny_sd1, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "AT_ONCE", 3)
        other = Made(open_checkpoint(str(tiny_sd1)), preset, tmp_path, accelerator)
    assert other.samples == sd1.samples
    for shard in sd1.plan.shards:
        together, apart = sd1.set.read(shard), other.set.read(shard)
        for name, tensor in together.items():
            assert close(apart[name].double(), tensor.double(), 2e-3)


def test_the_text_encoders_go_before_a_unet_comes(tiny_sd1, monkeypatch):
    loaded = []

    def load(*arguments, real=models.load_text_encoders):
        encoders = real(*arguments)
        loaded.extend(map(weakref.ref, encoders))
        return encoders

    monkeypatch.setattr(models, "load_text_encoders", load)
    checkpoint = open_checkpoint(str(tiny_sd1))
    checkpoint.family.denoise(checkpoint).condition(["a knife"], torch.device("cpu"))
    assert [encoder() for encoder in loaded] == [None]


def test_a_shard_says_what_it_was_made_of(sd1):
    shard = sd1.plan.of("unsafe")[0]
    with safe_open(sd1.set.folder / shard.name, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["made_from"]) == sd1.identity
    first = json.loads(metadata["trajectories"])[0]
    assert (first["prompt"], first["safe"]) == ("a knife", "a tulip")


def test_benign_trajectories_take_captions_and_words_in_turns(sd1):
    trajectories = sd1.plan.trajectories["benign"]
    asked = [one.prompt for one in trajectories]
    assert sorted(asked.count(text) for text in PRIOR.captions) == [1, 2]
    assert [asked.count(word) for word in WORDS] == [1, 1]
    assert {one.prompt for one in sd1.plan.trajectories["benign-check"]} == set(PRIOR.canaries)


def test_templates_and_noise_differ_between_the_trajectories_of_a_concept(sd1):
    trajectories = sd1.plan.trajectories["unsafe"]
    assert [one.prompt for one in trajectories] == [
        "a knife",
        "a photo of a knife",
        "a photo of a pistol",
        "a pistol on the kitchen table",
    ]
    every = [one for some in sd1.plan.trajectories.values() for one in some]
    assert len({one.seed for one in every}) == len(every) - len(sd1.plan.trajectories["stage1"])
    checked = sd1.plan.trajectories["unsafe-check"]
    assert not {one.prompt for one in checked} & {one.prompt for one in trajectories}


def test_the_papers_set_stays_under_a_gigabyte_for_sd1(preset, tiny_sd1):
    concepts = tuple(
        preset.concepts[0].model_copy(update={"unsafe": f"a knife {n}", "safe": f"a tulip {n}"})
        for n in range(20)
    )
    many = preset.model_copy(update={"concepts": concepts})
    # The set of the paper's own loss, which has no benign states.
    plan = plan_trajectories(open_checkpoint(str(tiny_sd1)), [many], PRIOR, Recipe(benign=0))
    plan = replace(plan, shape=(4, 64, 64))
    assert (plan.states("unsafe"), plan.states("unconditional")) == (2500, 2000)
    assert plan.total_bytes < 1e9
    plain = (100 + 2000) * 50 * 4 * 64 * 64 * 4  # all 50 latents of every trajectory in fp32
    assert plan.total_bytes < plain / 20


def test_the_announced_size_is_that_on_disk(sd1):
    size = sum(path.stat().st_size for path in sd1.set.folder.iterdir())
    headers = 0
    for path in sd1.set.folder.iterdir():
        headers += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert size - headers == sd1.plan.total_bytes


def test_only_what_is_missing_is_made(sd1, preset, accelerator, tiny_sd1, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(sd1.set.folder, folder)
    lost = [sd1.plan.of("unconditional-check")[0].name, sd1.plan.of("stage1")[0].name]
    for name in lost:
        (folder / name).unlink()
    again = Made(open_checkpoint(str(tiny_sd1)), preset, folder, accelerator)
    assert again.samples["teacher"] == sum(t.first for t in again.plan.trajectories["unconditional-check"])
    for name in lost:
        old = safe_open(sd1.set.folder / name, framework="pt")
        new = safe_open(folder / name, framework="pt")
        for key in old.keys():  # noqa: SIM118 - it is no mapping
            assert torch.equal(old.get_tensor(key), new.get_tensor(key))
    complete = Made(open_checkpoint(str(tiny_sd1)), preset, folder, accelerator)
    assert complete.samples == {"teacher": 0, "stage 1": 0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed was 0, and is 1 now"),
        ({"guidance_scale": 2.0}, "guidance scale"),
        ({"steps": 5}, "steps"),
    ],
)
def test_a_set_made_for_other_settings_is_refused(sd1, preset, tiny_sd1, change, named):
    checkpoint = open_checkpoint(str(tiny_sd1))
    recipe = RECIPE.model_copy(update=change)
    plan = plan_trajectories(checkpoint, [preset], PRIOR, recipe, WORDS)
    with pytest.raises(BadInput, match=named):
        TrajectorySet(sd1.set.folder, plan, identity(checkpoint, checkpoint, preset, recipe))


def test_a_set_made_for_another_preset_or_model_is_refused(sd1, preset, tiny_sd1, tiny_sd2):
    checkpoint, other = open_checkpoint(str(tiny_sd1)), open_checkpoint(str(tiny_sd2))
    renamed = preset.model_copy(update={"name": "another"})
    with pytest.raises(BadInput, match="presets was"):
        TrajectorySet(sd1.set.folder, sd1.plan, identity(checkpoint, checkpoint, renamed))
    with pytest.raises(BadInput, match="teacher was"):
        TrajectorySet(sd1.set.folder, sd1.plan, identity(other, checkpoint, preset))


@pytest.mark.parametrize("damage", ["cut", "pickle", "foreign", "shape", "dtype"])
def test_a_damaged_or_foreign_shard_is_refused(sd1, tmp_path, damage):
    folder = tmp_path / "set"
    shutil.copytree(sd1.set.folder, folder)
    path = folder / sd1.plan.of("unsafe")[0].name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "pickle":
        torch.save({"latents": torch.zeros(3)}, path)
    elif damage == "foreign":
        save_file({"latents": torch.zeros(3)}, path)
    else:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        if damage == "shape":
            save_file({"latents": torch.zeros(3)}, path, metadata)
        else:  # a mask in place of an index
            tensors = load_file(path)
            save_file(tensors | {"rows": tensors["rows"].bool()}, path, metadata)
    with pytest.raises(BadInput, match=path.name):
        TrajectorySet(folder, sd1.plan, sd1.identity)


def test_states_are_read_by_number_across_shards(sd1):
    states = sd1.set.states("unconditional", "stage1")
    assert len(states) == 6
    picked = states[[5, 0]]
    whole = sd1.set.read(sd1.plan.of("unconditional")[0])
    assert torch.equal(picked["latents"], whole["latents"][[5, 0]])
    assert picked["prediction"].shape == picked["latents"].shape
