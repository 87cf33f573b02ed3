import errno
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import toy
from trce_cli.checkpoint.open import open_checkpoint
from trce_cli.edits.forms import How
from trce_cli.edits.outputs import Outputs
from trce_cli.erase import steer as stage2
from trce_cli.erase import training as loop
from trce_cli.erase.prior import Prior
from trce_cli.erase.sampling import Predictor
from trce_cli.erase.settings import Recipe, Training, choose_steer_settings
from trce_cli.erase.steer import make_accelerator, steer
from trce_cli.erase.training import learning_rate, losses, order, tuned
from trce_cli.erase.trajectories import plan_trajectories
from trce_cli.erase.working_folder import WorkingFolder, tidy
from trce_cli.errors import BadInput, TrceError
from trce_cli.families.sd.denoiser import UNet
from trce_cli.families.sd.names import is_tuned
from trce_cli.maths.low_rank import Size
from trce_cli.prompts.presets import load_preset
from trce_cli.system import whole
from trce_cli.system.unfinished import placing
from trce_cli.system.whole import write_text

PRIOR = Prior("test", ("a fish", "a pig"), ("a dog in the garden", "two red apples on a plate"))
RECIPE = Recipe(steps=4, early_steps=2, trajectories_per_concept=1, unconditional=3, benign=3)
TRAINING = Training(lr=1e-3, batch_size=2, epochs=None, max_steps=4)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "toy.toml"
    path.write_text(toy.preset())
    return load_preset(path)


@pytest.fixture
def run(preset, tiny_sd1):
    """Steer a checkpoint, by default the tiny SD 1.x one, and return the entry."""

    def steered(output, folder=tiny_sd1, teacher=None, training=TRAINING, recipe=RECIPE, **options):
        erased = open_checkpoint(str(folder))
        plan = plan_trajectories(erased, [preset], PRIOR, recipe)
        accelerator = make_accelerator(torch.device("cpu"), "no")
        original = open_checkpoint(str(teacher or folder))
        return steer(erased, original, [preset], plan, training, output, accelerator, **options)

    return steered


def difference(a, b):
    one, other = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return max(float((one[key] - other[key]).abs().max()) for key in one)


# The loss


def batch(seed, count, targets):
    generator = torch.Generator().manual_seed(seed)
    states = {
        "latents": torch.randn(count, 4, 8, 8, generator=generator).half(),
        "timesteps": torch.randint(0, 1000, (count,), generator=generator),
        "rows": torch.tensor([1 + n % 2 for n in range(count)]),
    }
    if targets:
        prefer, reject = (torch.randn(count, 4, 8, 8, generator=generator) for _ in range(2))
        from trce_cli.maths.contrastive import Contrast

        contrast = Contrast.between(prefer, reject)
        return states | {"direction": contrast.direction, "offset": contrast.offset}, prefer, reject
    return states | {
        "rows": torch.zeros(count, dtype=torch.int64),
        "prediction": torch.randn(count, 4, 8, 8, generator=generator),
    }


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_step_is_one_pass_whose_loss_and_gradients_equal_a_naive_computation(family, request):
    checkpoint = open_checkpoint(str(request.getfixturevalue(f"tiny_{family}")))
    denoiser = checkpoint.family.denoise(checkpoint)
    conditioning = denoiser.condition(["a knife", "a pistol"], torch.device("cpu"))
    model = denoiser.load(torch.device("cpu"), train=True)
    unsafe, prefer, reject = batch(1, 3, targets=True)
    held, benign = batch(2, 2, targets=False), batch(4, 2, targets=False)
    benign["rows"] = torch.tensor([2, 1])
    passes = []
    hook = model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    states = {"unsafe": unsafe, "unconditional": held, "benign": benign}
    found = losses(Predictor(denoiser, model, conditioning), states, 0.3)
    hook.remove()
    assert passes == [3 + 3 + 2 + 2]
    training = Training(regularisation=7.0, retention=5.0)
    loss = loop.weighted([part.mean() for part in found], training)
    loss.backward()
    ours = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = denoiser.load(torch.device("cpu"), train=True)
    told = conditioning.streams

    def predict(states, n, row):
        inputs = {"encoder_hidden_states": told["context"][row : row + 1]}
        if "pooled" in told:
            ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
            inputs["added_cond_kwargs"] = {"text_embeds": told["pooled"][row : row + 1], "time_ids": ids}
        return plain(states["latents"][n : n + 1].float(), states["timesteps"][n], **inputs).sample[0]

    total = 0
    for n in range(3):
        for row in (int(unsafe["rows"][n]), 0):
            p = predict(unsafe, n, row)
            value = ((p - prefer[n]) ** 2).mean() - ((p - reject[n]) ** 2).mean() + 0.3
            total = total + torch.relu(value) / 6
    for n in range(2):
        total = total + 7.0 * ((predict(held, n, 0) - held["prediction"][n]) ** 2).mean() / 2
        p = predict(benign, n, int(benign["rows"][n]))
        total = total + 5.0 * ((p - benign["prediction"][n]) ** 2).mean() / 2
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    wanted = {key: p.grad for key, p in plain.named_parameters() if p.grad is not None}
    assert ours.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert all(torch.allclose(ours[key], wanted[key], rtol=1e-3, atol=1e-5 * largest) for key in wanted)


def test_gradients_exist_exactly_on_the_visual_attention(tiny_sdxl):
    checkpoint = open_checkpoint(str(tiny_sdxl))
    model = checkpoint.family.denoise(checkpoint).load(torch.device("cpu"), torch.float16, train=True)
    named = {key for key, p in model.named_parameters() if p.requires_grad}
    assert named == {key for key, _ in model.named_parameters() if ".attn1." in key or ".attn2.to_q." in key}
    assert not any(
        word in key for key in named for word in ("attn2.to_k", "attn2.to_v", "attn2.to_out", "ff")
    )
    assert {p.dtype for p in tuned(model).values()} == {torch.float32}
    assert {p.dtype for key, p in model.named_parameters() if key not in named} == {torch.float16}


# The order of things


def test_every_epoch_sees_every_state_once_in_another_order():
    drawn = [n for step in range(15) for n in order(10, 4, step, "0/unsafe")]
    epochs = [drawn[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order(10, 4, 7, "0/unsafe") == drawn[28:32]  # whatever was drawn before
    assert order(10, 4, 7, "1/unsafe") != drawn[28:32]


def test_the_learning_rate_warms_up_and_stays():
    training = Training(lr=2.0)
    rates = [learning_rate(training, step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert set(rates[5:]) == {2.0}
    assert learning_rate(training, 0, 1) == 2.0


def test_steps_are_epochs_or_a_maximum():
    assert Training(batch_size=4).steps_over(2500) == 1875
    assert Training(batch_size=4, max_steps=7).steps_over(2500) == 7
    assert Training(batch_size=4, epochs=None, max_steps=9999).steps_over(2500) == 9999


def test_settings_come_from_the_user_then_the_presets_then_the_paper():
    recipe, training = choose_steer_settings({}, {})
    assert (recipe, training) == (Recipe(), Training())
    assert (recipe.early_steps, training.lr, training.margin, training.epochs) == (25, 1e-6, 0.01, 3)
    advice = {"steps": 20, "early_steps": 4, "lr": 1e-4, "max_steps": 50}
    recipe, training = choose_steer_settings({"lr": 2e-4, "seed": 3, "steps": None}, advice)
    assert (recipe.steps, recipe.early_steps, recipe.seed, training.seed) == (20, 4, 3, 3)
    assert (training.lr, training.epochs, training.max_steps) == (2e-4, None, 50)
    recipe, training = choose_steer_settings({"steps": 31, "epochs": 2}, advice)
    assert (recipe.early_steps, training.epochs, training.max_steps) == (16, 2, None)
    with pytest.raises(BadInput, match="--early-steps is 21"):
        choose_steer_settings({"early_steps": 21}, advice)
    with pytest.raises(BadInput, match="--lr"):
        choose_steer_settings({"lr": 0.0}, advice)
    with pytest.raises(BadInput, match="--margin"):
        choose_steer_settings({"margin": math.inf}, advice)


# Whole runs


def test_only_the_visual_attention_changes_and_the_output_loads(run, tiny_sd1, tmp_path):
    entry = run(tmp_path / "out")
    old, new = load_file(tiny_sd1 / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed
    assert all(is_tuned(key) for key in changed)
    own = {"trce.json", "README.md", "steer.jsonl", "loss.png", WEIGHTS}
    for path in tiny_sd1.rglob("*"):
        name = path.relative_to(tiny_sd1).as_posix()
        if path.is_file() and name not in own:
            assert (tmp_path / "out" / name).read_bytes() == path.read_bytes()
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    key = sorted(changed)[0]
    assert torch.equal(pipeline.unet.state_dict()[key], new[key])

    history = json.loads((tmp_path / "out/trce.json").read_text())["history"]
    assert [one["edit"] for one in history] == ["steer"]
    assert history[0]["settings"]["lr"] == 1e-3
    assert history[0]["figures"] == entry["figures"]
    assert "trce steer" in (tmp_path / "out/README.md").read_text()
    log = [json.loads(line) for line in (tmp_path / "out/steer.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert log[0]["regulariser"] < 1e-5  # the student begins as stage 1
    assert log[0]["retention"] < 1e-5  # and stage 1 is the original here
    held = 100 * (log[3]["regulariser"] + log[3]["retention"])
    assert log[3]["loss"] == pytest.approx(log[3]["contrast"] + held)
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_training_moves_predictions_from_reject_toward_prefer(run, tmp_path):
    training = Training(lr=3e-3, batch_size=4, epochs=None, max_steps=40, regularisation=0.0, margin=1e3)
    figures = run(tmp_path / "out", training=training, max_drift=1e3)["figures"]
    assert figures["training"]["last"]["contrast"] < figures["training"]["first"]["contrast"]


def test_the_guard_measures_the_weights_as_they_are_saved(run, preset, tmp_path):
    half = tiny.build("sd1", tmp_path / "half", seed=1)
    tiny.add_fp16_variant(half)
    (half / WEIGHTS).unlink()  # a U-Net in fp16 alone
    entry = run(tmp_path / "out", half)
    new = load_file(tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors")
    old = load_file(half / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.float16}
    keys = [key for key in old if is_tuned(key)]
    changed = sum(int((old[key] != new[key]).sum()) for key in keys)
    count = sum(old[key].numel() for key in keys)
    assert entry["figures"]["weights"]["changed_share"] == pytest.approx(changed / count)
    with pytest.raises(TrceError, match="changed no weight by as much as F16 can hold"):
        run(tmp_path / "none", half, training=Training(lr=1e-12, batch_size=2, epochs=None, max_steps=1))
    assert not (tmp_path / "none").exists()


def test_every_copy_of_the_weights_gets_the_change(run, tmp_path):
    both = tiny.build("sd1", tmp_path / "both", seed=1)
    tiny.add_fp16_variant(both)
    run(tmp_path / "out", both)
    plain = load_file(tmp_path / "out" / WEIGHTS)
    half = load_file(tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.allclose(plain[key], half[key].float(), atol=2e-3) for key in plain)
    before = load_file(both / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert any(not torch.equal(before[key], half[key]) for key in half)


def test_a_single_file_is_steered_to_a_single_file(run, preset, tiny_sd1, tmp_path):
    path = tiny.single_file("sd1", tiny_sd1, tmp_path / "model.safetensors")
    erased = open_checkpoint(str(path), config=tiny_sd1)
    plan = plan_trajectories(erased, [preset], PRIOR, RECIPE)
    accelerator = make_accelerator(torch.device("cpu"), "no")
    output = tmp_path / "steered.safetensors"
    steer(erased, erased, [preset], plan, TRAINING, output, accelerator)
    run(tmp_path / "folder")
    steered, folder = open_checkpoint(str(output), config=tiny_sd1), open_checkpoint(str(tmp_path / "folder"))
    assert all(
        torch.equal(steered.read("denoiser", key), folder.read("denoiser", key))
        for key in folder.keys("denoiser")
    )
    names = ["steered.loss.png", "steered.safetensors", "steered.steer.jsonl"]
    assert sorted(path.name for path in tmp_path.glob("steered*")) == names
    assert json.loads(steered.provenance_text())["history"][0]["edit"] == "steer"


def test_too_much_drift_stops_the_save_and_can_be_accepted_later(run, tmp_path):
    with pytest.raises(TrceError, match="--max-drift of 1e-06"):
        run(tmp_path / "out", max_drift=1e-6)
    assert not (tmp_path / "out").exists()
    # The trained state is still there: nothing is prepared or trained again.
    log = (tmp_path / ".out.steer/steer.jsonl").read_text()
    run(tmp_path / "out")
    assert (tmp_path / "out/steer.jsonl").read_text() == log
    assert not (tmp_path / ".out.steer").exists()


def test_a_run_that_was_interrupted_ends_at_the_same_weights(run, tmp_path, monkeypatch):
    run(tmp_path / "whole")
    monkeypatch.setattr(stage2, "SAVE_EVERY", -1.0)
    save = WorkingFolder.save

    def interrupted(self, step, *rest):
        save(self, step, *rest)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(WorkingFolder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.setattr(WorkingFolder, "save", save)
    log = tmp_path / ".parts.steer/steer.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "loss": 1}\n{"step": 4, "lo')  # logged after the last state
    run(tmp_path / "parts")
    assert difference(tmp_path / "whole", tmp_path / "parts") == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts/steer.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_a_run_knows_which_outputs_it_had_put_in_their_place(tmp_path):
    one, two = tmp_path / "x.lora.safetensors", tmp_path / "x.safetensors"
    outputs = Outputs({"lora": one, "single-file": two}, How(Size()))
    folder = tmp_path / ".x.steer"
    assert tidy(tmp_path / "x", outputs) == outputs
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with placing(folder):
        write_text(one, "1")
        assert tidy(tmp_path / "x", outputs).how.force  # it may finish what it began
        two.write_text("somebody else's")
        assert not tidy(tmp_path / "x", outputs).how.force
        assert folder.exists()
        two.unlink()
        write_text(two, "2")
    assert tidy(tmp_path / "x", outputs) == outputs
    assert sorted(tmp_path.iterdir()) == [one, two]  # it was done


@pytest.mark.parametrize(
    "line", ['{"step": 1}', '{"step": null, "loss": 1, "contrast": 1, "regulariser": 1, "retention": 1}']
)
def test_what_a_run_left_while_it_was_removed_counts_as_nothing(run, tmp_path, line):
    run(tmp_path / "out")
    (work := tmp_path / ".out.steer").mkdir()
    (work / "state.safetensors").write_bytes(b"of the run before")
    (work / "steer.jsonl").write_text(f"{line}\n")
    run(tmp_path / "out", force=True)
    assert len((tmp_path / "out/steer.jsonl").read_text().splitlines()) == 4
    assert not work.exists()


def test_trajectories_that_cannot_be_removed_are_told_and_go_with_the_next_run(run, tmp_path, monkeypatch):
    remove = shutil.rmtree

    def refuse(path, *args, **options):
        if path.name == "trajectories":
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        remove(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(OSError, match="Too many"):
            run(tmp_path / "out")
    work = tmp_path / ".out.steer"
    assert [path.name for path in work.iterdir()] == ["trajectories"]
    with pytest.raises(BadInput, match="already"):
        run(tmp_path / "out")
    assert not work.exists()


def test_staging_that_a_write_could_not_remove_goes_with_the_run(run, tmp_path, monkeypatch):
    save = WorkingFolder.save

    def saved(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr(whole, "_clear", lambda *paths: None)
            save(self, *args)

    monkeypatch.setattr(WorkingFolder, "save", saved)
    run(tmp_path / "out")
    assert not (tmp_path / ".out.steer").exists()


def test_a_configuration_of_accelerate_changes_no_gradient(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(torch.device("cpu"), "no").gradient_accumulation_steps == 1


def test_gradient_checkpointing_changes_nothing(run, tmp_path):
    run(tmp_path / "plain")
    run(tmp_path / "checkpointed", gradient_checkpointing=True)
    assert difference(tmp_path / "plain", tmp_path / "checkpointed") < 2e-5


def test_mixed_precision_keeps_what_is_tuned_in_fp32(preset, tiny_sdxl, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        erased = open_checkpoint(str(tiny_sdxl))
        plan = plan_trajectories(erased, [preset], PRIOR, RECIPE)
        accelerator = make_accelerator(torch.device("cpu"), "bf16")
        # With so wide a margin every state has a loss.
        training = Training(
            lr=1e-4, batch_size=2, epochs=None, max_steps=2, margin=1e3, mixed_precision="bf16"
        )
        steer(erased, erased, [preset], plan, training, tmp_path / "out", accelerator)
    finally:
        AcceleratorState._reset_state(True)
    old, new = load_file(tiny_sdxl / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    changes = torch.cat([(new[key] - old[key]).flatten() for key in old])
    # Two steps of 1e-4 at most, far below what bf16 holds of weights around 0.1.
    assert 0 < changes.abs().max() < 3e-4
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}


def test_without_states_to_hold_there_is_contrast_alone(run, tmp_path):
    recipe = Recipe(steps=4, early_steps=1, trajectories_per_concept=1, unconditional=0, benign=0)
    figures = run(tmp_path / "out", recipe=recipe)["figures"]
    assert figures["unconditional"]["states"] == 32  # now that nothing else holds them
    log = [json.loads(line) for line in (tmp_path / "out/steer.jsonl").read_text().splitlines()]
    assert {line["regulariser"] for line in log} == {line["retention"] for line in log} == {0.0}
    assert log[-1]["loss"] == log[-1]["contrast"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stage2, "SAVE_EVERY", -1.0)
    real = loop.losses
    calls = []

    def broken(*args):
        found = real(*args)
        calls.append(1)
        return found._replace(contrast=found.contrast * math.nan) if len(calls) == 3 else found

    monkeypatch.setattr(loop, "losses", broken)
    with pytest.raises(TrceError, match="not finite at step 3 of 4"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    state = load_file(tmp_path / ".out.steer/state.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    with open(tmp_path / ".out.steer/state.safetensors", "rb") as file:
        assert b'"step":"2"' in file.read(20000)


def test_a_nan_in_a_weight_is_refused_before_training(run, tiny_sd1, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_sd1, damaged)
    state = load_file(damaged / WEIGHTS)
    state["mid_block.attentions.0.transformer_blocks.0.ff.net.2.weight"][0, 0] = math.nan
    save_file(state, damaged / WEIGHTS, {"format": "pt"})
    with pytest.raises(BadInput, match=r"ff\.net\.2\.weight in .*damaged holds NaN"):
        run(tmp_path / "out", damaged)
    with pytest.raises(BadInput, match="holds NaN"):
        run(tmp_path / "out2", teacher=damaged)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize("wrong", ["family", "architecture", "text"])
def test_a_teacher_of_another_kind_is_refused_before_anything_is_computed(
    run, tiny_sd1, tiny_sd2, tmp_path, wrong, monkeypatch
):
    monkeypatch.setattr(UNet, "condition", None)
    teacher = tiny_sd2
    if wrong != "family":
        teacher = tmp_path / "teacher"
        shutil.copytree(tiny_sd1, teacher)
        if wrong == "architecture":
            config = json.loads((teacher / "unet/config.json").read_text())
            (teacher / "unet/config.json").write_text(json.dumps(config | {"attention_head_dim": 4}))
        else:
            state = load_file(teacher / "text_encoder/model.safetensors")
            state["text_model.final_layer_norm.bias"] += 1
            save_file(state, teacher / "text_encoder/model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="cannot be the teacher"):
        run(tmp_path / "out", teacher=teacher)
    assert not list(tmp_path.glob("*out*"))


def test_a_batch_that_cannot_be_shared_is_refused(preset, tiny_sd1, tmp_path):
    class Three:
        num_processes = 3

    erased = open_checkpoint(str(tiny_sd1))
    plan = plan_trajectories(erased, [preset], PRIOR, RECIPE)
    with pytest.raises(BadInput, match="batch of 4 cannot be shared by 3 processes"):
        steer(erased, erased, [preset], plan, Training(), tmp_path / "out", Three())
