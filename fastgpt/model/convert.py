"""Models to and from the layout of Hugging Face's OpenAIGPTLMHeadModel and GPT2LMHeadModel.

Theirs keeps weights of its Conv1D as (in, out), ours as (out, in); otherwise the two differ in names only. What is read
has `embedding: separate`, as theirs.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from fastgpt_kernels import Ops
from pydantic import ValidationError
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.layers import EPSILON
from fastgpt.model.state import model_from_state, split_table

log = logging.getLogger(__name__)

BLOCK_NAMES = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
OUTER_NAMES = {
    "gpt2": {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"},
    "openai-gpt": {"token_embedding": "tokens_embed", "position_embedding": "positions_embed"},
}
NORMS: dict[str, Literal["pre", "post"]] = {"gpt2": "pre", "openai-gpt": "post"}
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "openai-gpt": "OpenAIGPTLMHeadModel"}

# Settings of which we compute one value: what transformers takes where the key is absent, then others that mean the
# same. Both models use the tanh form of GELU, which transformers calls "gelu" in this one place.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (EPSILON,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "openai-gpt": {"afn": ("gelu",), "layer_norm_epsilon": (EPSILON,), "tie_word_embeddings": (True,)},
}
SIZES = {  # of ModelConfig, and their names in config.json
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "context": "n_positions",
    "vocab_size": "vocab_size",
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|(^|\.)positions?_ids$")  # constants that older files hold
LINEAR = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def to_hugging_face(model: LanguageModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, in their own dtype, and the config.json of the same model in transformers.

    The tied `lm_head.weight` is left out, as transformers leaves it out of its files. A table of tokens and positions
    becomes two: theirs gives the same logits of the tokens, but its softmax does not span the positions; the log says
    so.

    Raises:
        UserError: neither of the two models of transformers computes what this one does.
    """
    config = model.config
    if config.kind != "transformer":
        raise UserError(f"model.kind: {config.kind} cannot be written for transformers, which has no such model")
    if config.attention != "dense":
        raise UserError(
            f"model.attention: {config.attention} cannot be written for transformers: its GPT-2 and OpenAI GPT read "
            "all earlier positions in every layer; only models with attention: dense can"
        )
    kind = "gpt2" if config.norm == "pre" else "openai-gpt"
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if config.embedding == "table":
        log.warning("transformers has no softmax over positions: its loss of this model is slightly lower than ours")
        parameters = split_table(parameters, config.vocab_size)
    state = {}
    for name, tensor in parameters.items():
        theirs = f"transformer.{_their_name(name, kind)}"
        state[theirs] = tensor.t().contiguous() if LINEAR.search(theirs) else tensor
    settings: dict[str, Any] = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "dtype": str(model.token_embedding.weight.dtype).removeprefix("torch."),
    }
    settings |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    settings |= dict.fromkeys(DROPOUTS, config.dropout)
    settings |= {key: allowed[0] for key, allowed in FIXED[kind].items()}
    return state, settings


def from_hugging_face(
    state: Mapping[str, Tensor], settings: Mapping[str, Any], ops: Ops, *, where: str = "Hugging Face model"
) -> LanguageModel:
    """A GPT from the tensors and the config.json of a transformers model.

    Args:
        state: names with or without the prefix "transformer.", tensors in any one floating-point dtype, which stays.
        settings: the content of config.json.
        ops: the operations of the model.
        where: the origin, for errors.

    Raises:
        UserError: the model is of another type, uses an option that fastgpt does not compute, does not tie its output
            matrix to the token table, or its tensors do not fit its settings.
    """
    config = _config(settings, where)
    state = {name.removeprefix("transformer."): t for name, t in state.items() if not BUFFERS.search(name)}
    kind = settings["model_type"]
    head = state.pop("lm_head.weight", None)
    table = state.get(OUTER_NAMES[kind]["token_embedding"] + ".weight")
    if head is not None and table is not None and not torch.equal(head, table):
        raise UserError(f"{where}: lm_head.weight differs from the token table; fastgpt ties the two")
    ours = {}
    for name, tensor in state.items():
        ours[_our_name(name, kind)] = tensor.t().contiguous() if LINEAR.search(f".{name}") else tensor
    return model_from_state(config, ops, ours, where=where)


def _config(settings: Mapping[str, Any], where: str) -> ModelConfig:
    kind = settings.get("model_type")
    if kind not in NORMS:
        raise UserError(f"{where}: model_type is {kind!r}; fastgpt reads {' and '.join(map(repr, NORMS))}")
    for key, allowed in FIXED[kind].items():
        value = settings.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{where}: {key} is {value!r}; fastgpt computes {' or '.join(map(repr, allowed))} only")
    dropouts = [settings.get(key, 0.1) for key in DROPOUTS]
    if any(p != dropouts[0] for p in dropouts):
        raise UserError(f"{where}: {', '.join(DROPOUTS)} are {dropouts}; fastgpt has one dropout for all three")
    fields = {ours: settings.get(theirs) for ours, theirs in SIZES.items()}
    try:
        config = ModelConfig.model_validate(fields | {"norm": NORMS[kind], "dropout": dropouts[0]})
    except ValidationError as problem:
        error = problem.errors()[0]
        key = str(error["loc"][0]) if error["loc"] else error["ctx"]["key"]
        theirs = SIZES.get(key, DROPOUTS[0])
        raise UserError(f"{where}: {theirs} is {settings.get(theirs)!r}: {error['msg']}") from None
    inner = settings.get("n_inner")
    if inner not in (None, 4 * config.n_embd):
        raise UserError(f"{where}: n_inner is {inner}; fastgpt computes 4 * n_embd = {4 * config.n_embd} only")
    return config


def _their_name(name: str, kind: str) -> str:
    """Our parameter's name in transformers, without its prefix."""
    module, _, leaf = name.rpartition(".")
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return f"h.{block[1]}.{BLOCK_NAMES[block[2]]}.{leaf}"
    return f"{OUTER_NAMES[kind][module]}.{leaf}"


def _our_name(name: str, kind: str) -> str:
    """The inverse of `_their_name`; a name that it never gives comes back as it is."""
    module, _, leaf = name.rpartition(".")
    if block := re.fullmatch(r"h\.(\d+)\.(.+)", module):
        inverse = {theirs: ours for ours, theirs in BLOCK_NAMES.items()}
        return f"blocks.{block[1]}.{inverse[block[2]]}.{leaf}" if block[2] in inverse else name
    inverse = {theirs: ours for ours, theirs in OUTER_NAMES[kind].items()}
    return f"{inverse[module]}.{leaf}" if module in inverse else name
