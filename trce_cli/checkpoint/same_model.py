"""Whether two checkpoints are one model, edited: what stage 2 needs of its teacher."""

from trce_cli.checkpoint.checkpoint import Checkpoint
from trce_cli.errors import BadInput
from trce_cli.system.safetensors import all_finite


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise BadInput for a weight of the denoiser that is not finite; one tensor is in memory at a time."""
    for key in checkpoint.keys("denoiser"):
        if not all_finite(checkpoint.read("denoiser", key)):
            raise BadInput(f"{key} in {checkpoint.path} holds NaN or infinite values.")


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are the same model, in whatever layout and dtype that changes no value.

    Read as far as they are equal, one tensor at a time, beginning with what edits change.
    """
    keys = one.keys("denoiser")
    if one.family is not other.family or set(keys) != set(other.keys("denoiser")):
        return False
    doors = [key for weights in one.door_weights().values() for key in weights if key in keys]
    for key in dict.fromkeys((*doors, *keys)):
        left, right = (each.read("denoiser", key).float() for each in (one, other))
        if left.shape != right.shape or not bool((left == right).all()):
            return False
    return one.text_encoder_hash() == other.text_encoder_hash()


def check_same_model(teacher: Checkpoint, erased: Checkpoint) -> str:
    """Raise BadInput where `erased` cannot have been made from `teacher`: another architecture, text or
    schedule.

    Reads headers, configs and the text encoders; computes nothing. Returns the text encoders' hash.
    """
    text_encoder = erased.text_encoder_hash()
    if teacher is erased:
        return text_encoder
    both = (teacher, erased)
    shapes = [{key: one.shape("denoiser", key) for key in one.keys("denoiser")} for one in both]
    configs = [
        {key: value for key, value in one.config["denoiser"].items() if not key.startswith("_")}
        for one in both
    ]
    schedules = (one.family.denoise(one).schedule(1).identity for one in both)
    if teacher.family != erased.family:
        difference = f"it is {teacher.family.name}, and {erased.name} is {erased.family.name}"
    elif shapes[0] != shapes[1] or configs[0] != configs[1]:
        difference = f"its {erased.family.network} is of another architecture than that of {erased.name}"
    elif teacher.text_encoder_hash() != text_encoder:
        difference = f"its text encoder is not that of {erased.name}"
    elif next(schedules) != next(schedules):
        difference = f"its noise schedule or prediction type is not that of {erased.name}"
    else:
        return text_encoder
    raise BadInput(
        f"{teacher.name} cannot be the teacher: {difference}.",
        "--teacher is the original from which the erased checkpoint was made.",
    )
