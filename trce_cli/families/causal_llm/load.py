"""Language models and their tokenizers as transformers has them, from the weights of a checkpoint."""

from typing import Any, Final

import torch
from torch import nn

from trce_cli.errors import BadInput, refusing
from trce_cli.families.base import Weights
from trce_cli.families.causal_llm.names import text_config
from trce_cli.families.causal_llm.spec import LlmSpec
from trce_cli.families.load import fast_tokenizer, guarded, load_strictly
from trce_cli.system.limits import limited

# What a chat template, a program by a stranger, may take for one prompt.
MAX_TEMPLATE_SECONDS: Final = 2.0
MAX_TEMPLATE_MEMORY: Final = 1 << 28  # bytes


def load_tokenizer(weights: Weights, spec: LlmSpec) -> Any:
    """The tokenizer, from local files only; BadInput for a broken one, and for one without a template where
    the family uses the tokenizer's, or that pads where the family does not."""
    folder = weights.folder(spec.tokenizer)
    tokenizer = fast_tokenizer(folder)
    if spec.template is None and not tokenizer.chat_template:
        raise BadInput(
            f"The tokenizer in {folder} has no chat template, without which no prompt can be put to it.",
            "Get the tokenizer with its tokenizer_config.json or chat_template.jinja.",
        )
    if spec.padded and tokenizer.padding_side != "right":
        raise BadInput(f"The tokenizer in {folder} pads before a prompt, not behind it.")
    _limit_template(tokenizer)
    return guarded(tokenizer, folder)


def _limit_template(tokenizer: Any) -> None:
    """Whoever renders prompts with it, its template runs within bounds; BadInput where it cannot be used."""
    render = tokenizer.apply_chat_template

    def bounded(*args: Any, **options: Any) -> Any:
        with (
            refusing("The chat template of the checkpoint's tokenizer cannot be used"),
            limited(MAX_TEMPLATE_SECONDS, MAX_TEMPLATE_MEMORY),
        ):
            return render(*args, **options)

    tokenizer.apply_chat_template = bounded


def make_model(spec: LlmSpec, config: dict[str, Any]) -> Any:
    """transformers' base model of this configuration: embed_tokens, layers, norm, rotary_emb."""
    import transformers

    if spec.kind == "qwen3":
        told: Any = transformers.Qwen3Config.from_dict(config)
        kind = transformers.Qwen3Model
    else:
        told = transformers.Qwen2_5_VLTextConfig.from_dict(dict(text_config(config)))
        kind = transformers.Qwen2_5_VLTextModel
    told._attn_implementation = "sdpa"
    return kind(told)


def rotary(model: Any, device: torch.device | str) -> nn.Module:
    """A model's rotary embedding with numbers in it: on the meta device it has none, and no file has them."""
    made: nn.Module = type(model.rotary_emb)(model.config).to(device)
    return made


def load_text_encoder(
    weights: Weights, spec: LlmSpec, device: torch.device | str, dtype: torch.dtype | None
) -> Any:
    """The language model on `device` in `dtype` (or the files'); see `load_strictly`."""
    model = load_strictly(
        lambda config: make_model(spec, config), weights, spec.folder, device, lambda key: dtype
    )
    model.rotary_emb = rotary(model, device)
    return model
