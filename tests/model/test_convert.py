from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels import load_ops
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.generate import generate
from fastgpt.model import GPT, build_model
from fastgpt.model.convert import from_hugging_face, to_hugging_face

SHAPES = [
    {"n_layer": 1, "n_head": 1, "n_embd": 3, "context": 1, "vocab_size": 2},
    {"n_layer": 2, "n_head": 3, "n_embd": 21, "context": 13, "vocab_size": 37},
    {"n_layer": 3, "n_head": 5, "n_embd": 80, "context": 47, "vocab_size": 501},
]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="comparing with transformers needs the extra 'hf'")


def theirs_of(transformers: Any, norm: str, shape: dict[str, int]) -> Any:
    """A Hugging Face model with random values in every parameter, biases and gains too."""
    sizes = {"n_positions" if key == "context" else key: value for key, value in shape.items()}
    if norm == "pre":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    else:
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1) * 0.5)
    return model.eval()


def assert_as_close_as_theirs(ours: Tensor, theirs: Tensor, oracle: Tensor) -> None:
    floor = torch.finfo(theirs.dtype).eps * oracle.abs().max()
    assert (ours - oracle).abs().max() <= 2 * torch.maximum((theirs - oracle).abs().max(), floor)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_their_weights_equal_theirs(transformers: Any, norm: str, shape: dict[str, int]) -> None:
    theirs = theirs_of(transformers, norm, shape)
    ours = from_hugging_face(theirs.state_dict(), theirs.config.to_dict(), load_ops("torch")).eval()
    tokens = torch.randint(shape["vocab_size"], (3, shape["context"]))
    logits = [ours(tokens), theirs(tokens).logits, theirs.double()(tokens).logits]
    assert_as_close_as_theirs(*logits)
    in_float64 = from_hugging_face(theirs.state_dict(), theirs.config.to_dict(), load_ops("reference")).eval()
    torch.testing.assert_close(in_float64(tokens), logits[2])


@torch.no_grad()
def test_logits_of_our_weights_in_their_model_equal_ours(transformers: Any, model: GPT, tokens: Tensor) -> None:
    state, settings = to_hugging_face(model)
    kind = transformers.GPT2Config if model.config.norm == "pre" else transformers.OpenAIGPTConfig
    theirs = getattr(transformers, settings["architectures"][0])(kind.from_dict(settings)).eval()
    loaded = theirs.load_state_dict(state, strict=False)
    assert loaded.unexpected_keys == []
    assert loaded.missing_keys == ["lm_head.weight"]  # tied
    assert_as_close_as_theirs(model(tokens), theirs(tokens).logits, theirs.double()(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_identical(model: GPT, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    back = from_hugging_face(*to_hugging_face(model), model.ops)
    assert back.config == model.config
    for (name, before), (same_name, after) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert name == same_name
        assert after.dtype == dtype
        assert after.is_contiguous()
        assert torch.equal(before, after)


def test_greedy_text_equals_theirs(transformers: Any, norm: str) -> None:
    theirs = theirs_of(transformers, norm, SHAPES[2])
    ours = from_hugging_face(theirs.state_dict(), theirs.config.to_dict(), load_ops("torch")).eval()
    prompt = [5, 0, 499, 7]
    expected = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=40,
        min_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
    )
    tokens = generate(lambda window: ours(window, last_only=True), prompt, steps=40, context=47, temperature=0)
    assert list(tokens) == expected[0, len(prompt) :].tolist()


def test_names_without_prefix_old_buffers_and_a_tied_head_are_read(model: GPT) -> None:
    state, settings = to_hugging_face(model)
    older = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    table = next(tensor for name, tensor in older.items() if name in ("wte.weight", "tokens_embed.weight"))
    older |= {
        "h.0.attn.bias": torch.ones(1, 1, 13, 13, dtype=torch.uint8),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
        "position_ids": torch.arange(13),
        "lm_head.weight": table.clone(),
    }
    back = from_hugging_face(older, settings, model.ops)
    for before, after in zip(model.parameters(), back.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("norm", "change", "message"),
    [
        ("pre", {"model_type": "llama"}, "here: model_type is 'llama'; fastgpt reads 'gpt2' and 'openai-gpt'"),
        ("pre", {"activation_function": "relu"}, "activation_function is 'relu'; fastgpt computes 'gelu_new' or"),
        ("pre", {"activation_function": "gelu"}, "activation_function is 'gelu'"),  # erf, in GPT-2's config
        ("post", {"afn": "swish"}, "afn is 'swish'; fastgpt computes 'gelu' only"),
        ("pre", {"n_inner": 60}, r"n_inner is 60; fastgpt computes 4 \* n_embd = 84 only"),
        ("pre", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("pre", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("pre", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("post", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ("post", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; fastgpt computes 1e-05 only"),
        ("post", {"attn_pdrop": 0.2}, r"resid_pdrop, embd_pdrop, attn_pdrop are \[0\.0, 0\.0, 0\.2\]"),
        ("pre", {"n_head": 2}, r"n_embd is 21: must be a multiple of model\.n_head"),
        ("pre", {"n_layer": None}, "n_layer is None: "),
        ("pre", {"n_positions": "13"}, "n_positions is '13': "),
        ("pre", {"n_layer": 3}, r"here: blocks\.2\.norm_1\.weight is missing \(12 of"),
    ],
)
def test_settings_that_fastgpt_does_not_compute_are_refused(
    model: GPT, norm: str, change: dict[str, Any], message: str
) -> None:
    state, settings = to_hugging_face(model)
    with pytest.raises(UserError, match=message) as caught:
        from_hugging_face(state, settings | change, model.ops, where="here")
    assert "\n" not in str(caught.value)


def test_an_output_matrix_of_its_own_is_refused(model: GPT) -> None:
    state, settings = to_hugging_face(model)
    state["lm_head.weight"] = model.token_embedding.weight + 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the token table"):
        from_hugging_face(state, settings, model.ops)


def test_a_window_is_refused_with_what_they_compute(config_of: Callable[..., ModelConfig]) -> None:
    model = build_model(config_of(attention="alternating", window=4), load_ops("torch"))
    with pytest.raises(UserError, match=r"^model\.attention: alternating cannot be written .* attention: dense"):
        to_hugging_face(model)


def test_an_unknown_tensor_is_named(model: GPT) -> None:
    state, settings = to_hugging_face(model)
    state["transformer.h.0.crossattention.c_attn.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError, match=r"h\.0\.crossattention\.c_attn\.weight belongs to no parameter"):
        from_hugging_face(state, settings, model.ops)


def test_the_dropout_of_a_model_is_kept(config: ModelConfig) -> None:
    model = GPT(config.model_copy(update={"dropout": 0.25}), load_ops("torch"))
    state, settings = to_hugging_face(model)
    assert settings["attn_pdrop"] == 0.25
    assert from_hugging_face(state, settings, model.ops).config.dropout == 0.25
