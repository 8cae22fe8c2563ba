import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgpt_kernels import load_ops
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt.checkpoint.store import CheckpointStore
from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.load import load_model, save_model
from fastgpt.model import GPT, build_model
from fastgpt.model.convert import to_hugging_face
from fastgpt.tokenizer import train_tokenizer
from fastgpt.tokenizer.base import Tokenizer
from fastgpt.tokenizer.gpt1 import GPT1BPE

TOKENS = torch.tensor([[1, 2, 3, 250]])


class OneRank:
    rank = 0

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat and the other cat"] * 3, vocab_size=260)


@pytest.fixture(params=["pre", "post"])
def model(request: pytest.FixtureRequest) -> GPT:
    config = ModelConfig(n_layer=2, n_head=3, n_embd=21, context=13, vocab_size=261, norm=request.param, dropout=0.1)
    return build_model(config, load_ops("torch"), seed=5)


@pytest.fixture
def folder(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    save_model(tmp_path / "model", model.state_dict(), model.config, tokenizer)
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    """A run with the checkpoints of steps 1 and 2; the weights of step s are the model's plus s."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step in (1, 2):
        state = {name: tensor + step for name, tensor in model.state_dict().items()}
        write = lambda p, s=state: save_model(p / "model", s, model.config, tokenizer)  # noqa: E731
        store.save(step, {}, [write], OneRank())
    return tmp_path / "run"


def first_weight(model: GPT) -> float:
    return next(model.parameters())[0, 0].item()


def step_of(loaded: GPT, model: GPT) -> int:
    return round(first_weight(loaded) - first_weight(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_model_comes_back_bit_for_bit_in_its_dtype(tmp_path: Path, model: GPT, dtype: torch.dtype) -> None:
    model = model.to(dtype).eval()
    save_model(tmp_path, model.state_dict(), model.config, None)
    loaded, tokenizer = load_model(tmp_path)
    assert tokenizer is None
    assert loaded.config == model.config
    assert not loaded.training
    for (name, before), (same_name, after) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == same_name
        assert after.dtype == dtype
        assert after.requires_grad
        assert torch.equal(before, after)
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_a_dtype_is_converted_on_request_only(folder: Path) -> None:
    loaded, _ = load_model(folder, dtype=torch.float64, backend="reference")
    assert loaded(TOKENS).dtype == torch.float64


def test_the_tokenizer_comes_with_the_model(folder: Path, tokenizer: Tokenizer) -> None:
    _, loaded = load_model(folder)
    assert loaded is not None
    assert loaded.fingerprint() == tokenizer.fingerprint()


def test_pieces_of_one_flat_buffer_are_saved_as_the_tensors_they_are(tmp_path: Path, model: GPT) -> None:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    pieces = flat.split([p.numel() for p in model.parameters()])
    state = {name: piece.view(p.shape) for (name, p), piece in zip(model.named_parameters(), pieces, strict=True)}
    save_model(tmp_path, state, model.config, None)
    assert torch.equal(load_model(tmp_path)[0](TOKENS), model.eval()(TOKENS))
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * flat.numel() + 10_000


def test_a_run_gives_its_newest_checkpoint(run: Path, model: GPT) -> None:
    assert step_of(load_model(run)[0], model) == 2
    assert step_of(load_model(run / "checkpoints" / "step-00000001")[0], model) == 1
    assert step_of(load_model(run / "checkpoints" / "step-00000001" / "model")[0], model) == 1


def test_a_run_gives_the_checkpoint_that_latest_names(run: Path, model: GPT) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000001\n")
    assert step_of(load_model(run)[0], model) == 1


@pytest.mark.parametrize("damage", [None, b"", b"step-00000007\n", b"\xff\xfe\x00", b"../../secrets"])
def test_a_missing_or_damaged_latest_means_the_newest_whole_checkpoint(
    run: Path, model: GPT, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    latest = run / "checkpoints" / "latest"
    latest.unlink() if damage is None else latest.write_bytes(damage)
    torn = run / "checkpoints" / "step-00000003"
    torn.mkdir()
    with caplog.at_level(logging.WARNING):
        assert step_of(load_model(run)[0], model) == 2
    assert "taking the newest, step-00000002" in caplog.text


def test_a_changed_byte_in_a_checkpoints_weights_is_found(run: Path) -> None:
    weights = run / "checkpoints" / "step-00000002" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        UserError, match=r"step-00000002/model/model\.safetensors: its content does not match its SHA-256"
    ):
        load_model(run)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        load_model(run)


def test_a_run_without_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="checkpoints: no checkpoint yet"):
        load_model(tmp_path)


def test_a_hugging_face_folder_is_read(tmp_path: Path, model: GPT, tokenizer: Tokenizer) -> None:
    state, settings = to_hugging_face(model)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded, none = load_model(tmp_path)
    assert none is None
    assert torch.equal(loaded(TOKENS), model.eval()(TOKENS))
    tokenizer.save(tmp_path)
    beside = load_model(tmp_path)[1]
    assert beside is not None and beside.fingerprint() == tokenizer.fingerprint()


def test_gpt1s_tokenizer_comes_with_its_model_though_its_packages_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: GPT
) -> None:
    if model.config.norm == "pre":
        pytest.skip("GPT-1 is the model with norm: post")
    state, settings = to_hugging_face(model)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    GPT1BPE({"<unk>": 0, "a</w>": 1}, []).save(tmp_path)
    monkeypatch.setitem(sys.modules, "spacy", None)
    loaded, tokenizer = load_model(tmp_path)
    assert torch.equal(loaded(TOKENS), model.eval()(TOKENS))
    assert tokenizer is not None and tokenizer.decode([1]) == "a "
    with pytest.raises(UserError, match=r"fastgpt\[gpt1\]"):
        tokenizer.encode("a")


def test_a_folder_that_transformers_wrote_in_shards_is_read(tmp_path: Path, model: GPT) -> None:
    transformers = pytest.importorskip("transformers", reason="writing with transformers needs the extra 'hf'")
    state, settings = to_hugging_face(model)
    kind = transformers.GPT2Config if model.config.norm == "pre" else transformers.OpenAIGPTConfig
    theirs = getattr(transformers, settings["architectures"][0])(kind.from_dict(settings))
    theirs.load_state_dict(state, strict=False)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path)[0](TOKENS), model.eval()(TOKENS))


def test_a_config_of_before_there_were_kinds_of_models_is_a_transformers(folder: Path, model: GPT) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("kind") == "transformer" and settings.pop("n_units") is None
    path.write_text(json.dumps(settings))
    again, _ = load_model(folder)
    assert again.config == model.config and torch.equal(again(TOKENS), model.eval()(TOKENS))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    state = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


def into_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def into_shards(folder: Path, places: Any) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "neither a run, nor a checkpoint, nor a model"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json: must hold a JSON object"),
    "model type": (lambda f: edit(f, model_type="fastgtp"), "model_type is 'fastgtp'; .* Did you mean fastgpt?"),
    "model type a list": (lambda f: edit(f, model_type=[]), r"model_type is \[\]; known: fastgpt, gpt2, openai-gpt"),
    "unknown setting": (lambda f: edit(f, n_embed=3), r"config\.json: n_embed: .* Did you mean n_embd\?"),
    "mistyped setting": (lambda f: edit(f, n_layer="2"), r"config\.json: n_layer: Input should be a valid integer"),
    "heads": (lambda f: edit(f, n_head=2), r"config\.json: n_embd: must be a multiple"),
    "no heads": (lambda f: edit(f, n_head=None), r"config\.json: n_head: is missing; it must be an integer"),
    "units": (lambda f: edit(f, n_units=3), r"config\.json: n_units: is 3, but model\.kind is transformer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    "pickle": (into_pickle, "is pickle, which can run code and is not read; convert it"),
    "missing tensor": (
        lambda f: change_tensors(f, {"blocks.1.mlp.up.bias": None}),
        r"blocks\.1\.mlp\.up\.bias is missing",
    ),
    "extra tensor": (
        lambda f: change_tensors(f, {"x": torch.zeros(1)}),
        r"model\.safetensors: x belongs to no parameter",
    ),
    "shape": (lambda f: change_tensors(f, {"blocks.1.mlp.up.bias": torch.zeros(3)}), r"has shape \(3,\)"),
    "truncated": (truncate, r"model\.safetensors: not a whole safetensors file"),
    "header": (corrupt_header, r"model\.safetensors: not a whole safetensors file"),
    "empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"model\.safetensors: not a whole safetensors file",
    ),
    "index": (lambda f: into_shards(f, []), r"index\.json: weight_map must give each tensor the name of a file"),
    "shard": (lambda f: into_shards(f, {"a": "b.safetensors"}), r"b\.safetensors: missing"),
    "escape": (lambda f: into_shards(f, {"a": "../b"}), "'../b' is not the name of a file beside it"),
    "vocabulary": (lambda f: edit(f, vocab_size=200), r"token_embedding\.weight has shape \(261, 21\)"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(folder: Path, breakage: str) -> None:
    spoil, message = BREAKAGES[breakage]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=2, context=3, vocab_size=100)
    save_model(tmp_path, build_model(config, load_ops("torch")).state_dict(), config, tokenizer)
    with pytest.raises(UserError, match="the tokenizer has 260 tokens and the model 100"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: 'tpu' is not known; allowed: auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:99"}, "cuda:99 asks for GPU 99"),
        ({"backend": "tritn"}, "backend: 'tritn' is not a kernel backend.*Did you mean 'triton'"),
    ],
)
def test_a_device_or_backend_that_is_not_there_is_an_error(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")


def test_importing_fastgpt_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'yaml', 'triton', 'tokenizers', 'deepspeed', 'transformers'}"
    command = f"import sys, fastgpt; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_exports_its_public_surface() -> None:
    assert fastgpt.build_model is build_model
    assert fastgpt.load_model is load_model
    assert {name for name in fastgpt.__all__ if hasattr(fastgpt, name)} == set(fastgpt.__all__) == set(dir(fastgpt))
    assert fastgpt.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="module 'fastgpt' has no attribute 'load_modle'"):
        fastgpt.load_modle  # noqa: B018
