"""What an SD checkpoint predicts and how it is sampled: as its scheduler says, and as a single file does.

A single file has no scheduler's configuration. What its readers go by is in it: empty tensors for
v-prediction and a noise schedule that ends in noise alone, ModelSpec's and kohya's metadata, the statistics
of EDM models' latents, and for SD 2.x how the weights look. This module reads and writes all of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from trce_cli.errors import BadInput
from trce_cli.families.base import Shape, Told
from trce_cli.families.sd.config import Scheduler
from trce_cli.families.sd.marks import EDM, EDM_V, V_PRED, ZERO_SNR
from trce_cli.system.foreign import parse_json, validated

if TYPE_CHECKING:
    from torch import Tensor

SCHEDULER: Final = "trce_scheduler"  # our metadata: the scheduler's configuration as JSON

# By how SD 2.x files are told apart: the spread of this bias, which is small in those that predict noise.
SD2_BIAS: Final = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
_SD2_SPREAD: Final = 0.09
# By what other readers go as well: how long the published ones were trained, which their files say.
_STEP: Final = "global_step"
_SD2_STEPS: Final = {875_000.0: "epsilon", 110_000.0: "v_prediction"}
# Schedulers that know a schedule that ends in noise alone; others would leave it out in silence.
_ZERO_SNR: Final = ("DDIM", "DDPM", "DPMSolverMultistep", "Euler", "UniPC", "LCM", "TCD")
_FEW_STEPS: Final = ("LCMScheduler", "TCDScheduler")
_COMPARED: Final = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps")


def told_by_file(
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    read: Callable[[str], "Tensor"],
    config: Mapping[str, Mapping[str, Any]],
    is_base: bool,
    bias: str | None,
) -> Told:
    """What a single file says of its sampling, where that differs from the configurations.

    read: a tensor by its name. is_base: whether the configurations are only those of the family's base. bias:
    the name of `SD2_BIAS` in the file if it is of SD 2.x, whose base's file does not say; else None.
    """
    if all(name in shapes for name in EDM):
        return Told(_edm(config, {ours: _values(read(name)) for name, ours in EDM.items()}))
    if EDM_V in shapes:
        if len(sigma := _values(read(EDM_V))) != 1:
            raise BadInput(f"The tensor {EDM_V} holds {len(sigma)} numbers; it has to be one.")
        return Told(_sampled_with(config, {**_COSXL, "sigma_max": sigma[0]}))
    if SCHEDULER in metadata:
        return Told(_sampled_with(config, _kept(metadata[SCHEDULER])))
    scheduler = config["scheduler"]
    said: dict[str, Any] = {}
    notes: list[str] = []
    if V_PRED in shapes or (marked := _in_metadata(metadata)) == "v_prediction":
        said["prediction_type"] = "v_prediction"
    elif marked:
        said["prediction_type"] = marked
    elif bias is not None and is_base:
        by_step = _SD2_STEPS.get(_values(read(_STEP))[0]) if shapes.get(_STEP) in ((), (1,)) else None
        said["prediction_type"] = guessed = by_step or _sd2(bias, read)
        notes.append(
            f"The file does not say what it predicts; by its {_STEP if by_step else 'weights'} it is taken "
            f"for {guessed}, with "
            f"{_SD2_PIXELS[guessed]} pixels a side and upcast_attention = "
            f"{bool(config['denoiser'].get('upcast_attention'))}. Choose otherwise with a diffusers folder "
            "as --config."
        )
    zero = ZERO_SNR in shapes or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    if zero:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    changed = {key: value for key, value in said.items() if scheduler.get(key) != value}
    if not changed:
        return Told({}, tuple(notes))
    if zero and not knows_zero_snr(class_of(config)):
        changed |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    found = _sampled_with(config, {"_class_name": class_of(config), **scheduler, **changed})
    if bias is not None and is_base and "prediction_type" in changed:
        size = _SD2_PIXELS[changed["prediction_type"]] // 8
        found["denoiser"] = {**config["denoiser"], "sample_size": size}
    if not is_base:
        notes.append(
            "The file says of itself "
            + ", ".join(f"{key} = {value}" for key, value in changed.items())
            + ", which --config does not: the file is believed."
        )
    return Told(found, tuple(notes))


_SD2_PIXELS: Final = {"v_prediction": 768, "epsilon": 512}


def _sd2(bias: str, read: Callable[[str], "Tensor"]) -> str:
    if bias and float(read(bias).float().std(unbiased=False)) <= _SD2_SPREAD:
        return "epsilon"
    return "v_prediction"


def _in_metadata(metadata: Mapping[str, str]) -> str | None:
    """What ModelSpec or kohya's trainer says of the prediction."""
    said = metadata.get("modelspec.prediction_type", "").lower()
    if said in ("v", "v_prediction", "epsilon"):
        return "epsilon" if said == "epsilon" else "v_prediction"
    return "v_prediction" if metadata.get("ss_v_parameterization", "").lower() == "true" else None


def _values(tensor: "Tensor") -> list[float]:
    return [float(value) for value in tensor.flatten()[:64]]


_PLAYGROUND: Final[Mapping[str, Any]] = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    **{"algorithm_type": "dpmsolver++", "euler_at_final": False, "final_sigmas_type": "zero"},
    **{"lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "epsilon"},
    **{"rho": 7.0, "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002, "solver_order": 2},
    **{"solver_type": "midpoint"},
}
_COSXL: Final[Mapping[str, Any]] = {
    "_class_name": "EDMEulerScheduler",
    **{"num_train_timesteps": 1000, "prediction_type": "v_prediction", "sigma_data": 1.0},
    **{"sigma_max": 120.0, "sigma_min": 0.002, "sigma_schedule": "exponential"},
}


def _edm(
    config: Mapping[str, Mapping[str, Any]], latents: Mapping[str, list[float]]
) -> dict[str, Mapping[str, Any]]:
    """Playground v2.5's configurations, whose latents have such mean and deviation."""
    vae = {**config["vae"], **latents, "scaling_factor": 0.5}
    return {**_sampled_with(config, _PLAYGROUND), "vae": vae}


def _sampled_with(
    config: Mapping[str, Mapping[str, Any]], scheduler: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The configurations with this scheduler."""
    index = {**config["model_index"], "scheduler": ["diffusers", scheduler["_class_name"]]}
    return {"scheduler": scheduler, "model_index": index}


def _kept(text: str) -> dict[str, Any]:
    """The scheduler's configuration that we keep in a file's metadata."""
    where = f"The metadata {SCHEDULER}"
    table = parse_json(text, where)
    validated(Scheduler, table, where)
    if not isinstance(table.get("_class_name"), str):
        raise BadInput(f"{where} names no scheduler.")
    return dict(table)


def marks(
    config: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Sequence[float]], dict[str, str]]:
    """Tensors, by name their values, and metadata by which a single file says what configurations do.

    base: those that are taken where a file says nothing.
    """
    scheduler, tensors = config["scheduler"], {}
    if is_edm(class_of(config)):
        vae = config["vae"]
        if all(vae.get(ours) for ours in EDM.values()):
            tensors = {name: vae[ours] for name, ours in EDM.items()}
        elif scheduler.get("prediction_type") == "v_prediction":
            tensors = {EDM_V: [float(scheduler.get("sigma_max", 120.0))]}
    else:
        if {one.get("prediction_type", "epsilon") for one in (scheduler, base["scheduler"])} == {
            "v_prediction",
            "epsilon",
        } and scheduler.get("prediction_type") == "v_prediction":
            tensors[V_PRED] = []
        if scheduler.get("rescale_betas_zero_snr"):
            tensors[ZERO_SNR] = []
    if sampling(config) == sampling(base) and all(
        scheduler.get(key) == base["scheduler"].get(key) for key in _COMPARED
    ):
        return tensors, {}
    return tensors, {SCHEDULER: json.dumps({**scheduler, "_class_name": class_of(config)})}


def sampling(config: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What configurations say of prediction, noise and timesteps, for people."""
    scheduler = config["scheduler"]
    return {
        "scheduler": class_of(config),
        "predicts": str(scheduler.get("prediction_type") or "epsilon"),
        "zero terminal SNR": "yes" if scheduler.get("rescale_betas_zero_snr") else "no",
        "timesteps": str(scheduler.get("timestep_spacing") or "of the scheduler's own"),
    }


def lost_in_file(
    config: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]], are_read: bool
) -> list[str]:
    """Sentences on what other readers will not find in a single file.

    are_read: whether they look for the tensors that mark v-prediction and noise alone at the end.
    """
    tensors, kept = marks(config, base)
    if not kept:
        return []
    told = {what: value for what, value in sampling(config).items() if sampling(base)[what] != value}
    if V_PRED in tensors and are_read:
        del told["predicts"]
    if ZERO_SNR in tensors and are_read:
        told.pop("zero terminal SNR", None)
    if not told and not few_steps(config):
        return []
    said = ", ".join(f"{what} {value}" for what, value in told.items()) or "its noise schedule"
    few = few_steps(config)
    guided = ["No other tool reads an LCM's single file."] * bool(
        config["denoiser"].get("time_cond_proj_dim")
    )
    return [
        *guided,
        f"Single files have no place for how a checkpoint is sampled: other tools have to be told ({said})"
        + (" and to draw in few steps with little guidance" if few else "")
        + "; trce reads it from the metadata.",
    ]


def class_of(config: Mapping[str, Mapping[str, Any]]) -> str:
    """Diffusers' class of the scheduler: that of the pipeline's index, which is what is loaded."""
    entry = config["model_index"].get("scheduler")
    indexed = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return str(indexed or config["scheduler"].get("_class_name"))


def is_edm(scheduler: str) -> bool:
    """Whether a scheduler has no betas but sigmas of its own."""
    return scheduler.startswith(("EDM", "Flow"))


def few_steps(config: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the checkpoint was distilled to few steps, as LCM, Turbo and Lightning are; None if it was not."""
    scheduler, name = config["scheduler"], class_of(config)
    if config["denoiser"].get("time_cond_proj_dim"):
        return "its U-Net takes the guidance as an input (LCM)"
    if name in _FEW_STEPS:
        return f"its scheduler is {name}"
    trailing = scheduler.get("timestep_spacing") == "trailing" and name.startswith("Euler")
    noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
    if trailing and noise and not scheduler.get("rescale_betas_zero_snr"):
        return f"its scheduler is {name} with trailing timesteps (Turbo, Lightning)"
    return None


def knows_zero_snr(scheduler: str) -> bool:
    """Whether diffusers' class of a scheduler knows a schedule that ends in noise alone."""
    return scheduler.startswith(_ZERO_SNR)
