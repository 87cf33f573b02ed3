"""What a CLIP encoder's configuration may say before a library sees it: its numbers are memory and time."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.families.base import Configs
from trce_cli.families.clip.names import CONFIG, MOST_POSITIONS
from trce_cli.families.clip.spec import EncoderSpec
from trce_cli.families.tokenizer_files import check_files
from trce_cli.system.foreign import validated

Size = Annotated[int, Field(ge=1, le=1 << 16)]


class Clip(BaseModel):
    """The sizes of an encoder."""

    model_config = ConfigDict(strict=True)

    hidden_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)]
    max_position_embeddings: Annotated[int, Field(ge=1, le=MOST_POSITIONS)]
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 18)]
    num_attention_heads: Annotated[int, Field(ge=1, le=1 << 10)]
    hidden_act: Annotated[str, Field(max_length=64)]
    layer_norm_eps: Annotated[FiniteFloat, Field(ge=0, le=1)]


class Projecting(Clip):
    """The sizes of one whose pooled output is projected."""

    projection_dim: Size


def check(config: Configs, specs: Sequence[EncoderSpec]) -> None:
    """Raise BadInput where a configuration says what cannot be, or a tokenizer is not there."""
    for spec in specs:
        where = config.path / spec.folder / "config.json"
        validated(Projecting if spec.projects else Clip, {**CONFIG, **config[spec.folder]}, str(where))
    for spec in specs:
        check_files(config.path / spec.tokenizer)
