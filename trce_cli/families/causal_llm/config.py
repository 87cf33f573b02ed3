"""What a language model's configuration may say before a library sees it: its numbers are memory and time."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from trce_cli.errors import BadInput
from trce_cli.families.base import Configs
from trce_cli.families.causal_llm.names import text_config
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.tokenizer_files import check_files
from trce_cli.system.foreign import validated

Heads = Annotated[int, Field(ge=1, le=1 << 10)]


class Llm(BaseModel):
    """The sizes of a decoder."""

    model_config = ConfigDict(strict=True)

    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)]
    hidden_size: Annotated[int, Field(ge=1, le=1 << 16)]
    intermediate_size: Annotated[int, Field(ge=1, le=1 << 18)]
    num_hidden_layers: Annotated[int, Field(ge=2, le=256)]
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Field(ge=2, le=1 << 12)] | None = None
    rms_norm_eps: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1e-6
    hidden_act: str = "silu"
    use_sliding_window: bool | None = False
    sliding_window: int | None = None
    layer_types: Annotated[list[str], Field(max_length=256)] | None = None


def check(config: Configs, spec: LlmSpec) -> None:
    """Raise BadInput where the configuration lacks a size, or asks for what is not computed here, and for a
    tokenizer that is not to be read.
    """
    where = config.path / spec.folder / "config.json"
    told: Any = config[spec.folder]
    if (kind := told.get("model_type")) != spec.kind:
        raise BadInput(f"{where}: model_type is {str(kind)[:100]!r}, not {spec.kind!r}.")
    found = validated(Llm, dict(text_config(told)), str(where))
    heads, keys = found.num_attention_heads, found.num_key_value_heads or found.num_attention_heads
    if heads % keys or (found.head_dim is None and found.hidden_size % heads):
        raise BadInput(
            f"{where}: {heads} heads, {keys} of keys, and a width of {found.hidden_size} do not fit."
        )
    if isinstance(spec.hidden, tuple) and found.num_hidden_layers <= (deepest := max(spec.hidden)):
        raise BadInput(
            f"{where}: num_hidden_layers is {found.num_hidden_layers}, but layer {deepest} is read, which "
            "cannot be the last."
        )
    slides = set(found.layer_types or []) - {"full_attention"}
    if (slides or found.use_sliding_window) and (found.sliding_window or 0) < spec.limit:
        raise BadInput(f"{where}: its attention sees fewer tokens than a prompt may have.")
    check_files(config.path / spec.tokenizer)
