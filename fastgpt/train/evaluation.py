"""The watcher that measures the validation loss and lets the model write a sample."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from fastgpt.config import Config
from fastgpt.data.evaluation import covered_bytes, validation_windows
from fastgpt.data.shards import TokenShards
from fastgpt.engine.base import Engine, evaluation_loss
from fastgpt.generate import generate
from fastgpt.model.seeds import fold
from fastgpt.tokenizer import Tokenizer
from fastgpt.train.watchers import Measured

SAMPLE = 2  # what the run's seed is folded with for samples
TEMPERATURE, TOP_K = 0.8, 50


class Evaluation:
    """Validates before the first update, every `train.eval_every` updates, and after the last."""

    def __init__(
        self,
        engine: Engine,
        shards: TokenShards,
        tokenizer: Tokenizer,
        config: Config,
        *,
        record: Callable[[dict[str, Any]], None],
        show: Callable[[str], None],
    ) -> None:
        """Watch an engine; `record` takes each result, `show` a line for people."""
        self._engine = engine
        self._shards = shards
        self._tokenizer = tokenizer
        self._config = config
        self._record = record
        self._show = show
        self.results: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Validate the untrained model; a resumed run has done so."""
        if step == 0:
            self.validate(tokens=0, learning_rate=0.0)

    def looks_at(self, step: int) -> bool:
        """When it is time."""
        train = self._config.train
        return step == train.steps or bool(train.eval_every and step % train.eval_every == 0)

    def after(self, measured: Measured) -> None:
        """Validate when it is time."""
        update = measured.update
        if self.looks_at(update.step):
            self.validate(tokens=measured.tokens, learning_rate=update.learning_rate)

    def validate(self, *, tokens: int, learning_rate: float) -> dict[str, Any]:
        """Measure the validation split and record it; every rank takes part and gets the result."""
        start = time.perf_counter()
        loss, predicted = self._loss()
        seconds = time.perf_counter() - start
        length = covered_bytes(self._shards, predicted)
        result = {
            "step": self._engine.step,
            "split": "validation",
            "loss": loss,
            "tokens": tokens,
            "learning_rate": learning_rate,
            "grad_norm": None,
            "tokens_per_second": predicted / seconds,
            "perplexity": math.exp(min(loss, 700.0)),
            # nats over all predicted tokens, end-of-text tokens included, to bits over the UTF-8 bytes of the text
            "bits_per_byte": loss * predicted / math.log(2) / length,
            "predicted_tokens": predicted,
            "bytes": length,
        }
        if self._config.train.sample_tokens:
            result["sample"] = sample_text(self._engine, self._tokenizer, self._config)
        self.results.append(result)
        self._record(result)
        self._show(
            f"step {result['step']}  validation loss {loss:.4f}  perplexity {result['perplexity']:.2f}  "
            f"bits per byte {result['bits_per_byte']:.4f}"
        )
        if sample := result.get("sample"):
            self._show(f"  sample: {sample!r}")
        return result

    def _loss(self) -> tuple[float, int]:
        """Nats per predicted token, and how many there were; the sum runs in the order of the text."""
        engine, config = self._engine, self._config
        ranks = engine.ranks
        sums, counts = [], []
        for batch in validation_windows(
            self._shards,
            config.model.context,
            config.train.micro_batch_size,
            limit=config.train.eval_tokens,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ):
            sums.append(evaluation_loss(engine, torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)))
            counts.append(float((batch.targets >= 0).sum()))
        # batches are dealt to the ranks in turn, so the transposed table is the order of the text
        total = ranks.gather_floats(torch.tensor(sums, dtype=torch.float64)).T.reshape(-1)
        predicted = int(ranks.gather_floats(torch.tensor(counts, dtype=torch.float64)).sum())
        return math.fsum(total.tolist()) / predicted, predicted


def sample_text(engine: Engine, tokenizer: Tokenizer, config: Config) -> str:
    """Text from the model as it is; every rank computes it, as ZeRO-3's forward pass needs all of them."""
    train = config.train
    tokens = generate(
        engine.last_logits,
        [tokenizer.end_of_text, *tokenizer.encode(train.sample_prompt)],
        steps=train.sample_tokens,
        context=config.model.context,
        temperature=TEMPERATURE,
        top_k=min(TOP_K, config.model.vocab_size),
        seed=fold(train.seed, SAMPLE, engine.step),
    )
    # a vocabulary larger than the tokenizer's has ids that stand for no text
    known = [t for t in tokens if t < tokenizer.vocab_size]
    return train.sample_prompt + tokenizer.decode(known)
