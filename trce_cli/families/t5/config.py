"""What T5's configuration may say before a library sees it: its numbers are memory and time."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.families.base import Configs
from trce_cli.families.t5.spec import T5Spec
from trce_cli.families.tokenizer_files import check_files
from trce_cli.system.foreign import validated

Size = Annotated[int, Field(ge=1, le=1 << 16)]


class T5(BaseModel):
    """The sizes of an encoder."""

    model_config = ConfigDict(strict=True)

    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)]
    d_model: Size
    d_kv: Size
    d_ff: Annotated[int, Field(ge=1, le=1 << 18)]
    num_layers: Annotated[int, Field(ge=1, le=256)]
    num_heads: Annotated[int, Field(ge=1, le=1 << 10)]
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"
    layer_norm_epsilon: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1e-6
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=1 << 12)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=4, le=1 << 16)] = 128


def check(config: Configs, spec: T5Spec) -> None:
    """Raise BadInput where the configuration lacks a size or asks for what is not computed here, and for a
    tokenizer that is not to be read.
    """
    validated(T5, dict(config[spec.folder]), str(config.path / spec.folder / "config.json"))
    check_files(config.path / spec.tokenizer)
