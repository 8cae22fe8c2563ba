"""GPT: token and position embeddings, a stack of blocks, and the token table again as output matrix."""

from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.block import PostNormBlock, PreNormBlock
from fastgpt.model.cache import Cache, KeyValueCache
from fastgpt.model.dropout import Site, masks_of_layers
from fastgpt.model.frozen import frozen
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.layers import AddLayerNorm, NoNorm, PositionEmbedding, TableEmbedding, TiedEmbedding
from fastgpt.model.recompute import recomputed


class GPT(LanguageModel):
    """GPT-1 (`norm: post`) or GPT-2 (`norm: pre`, and a final normalisation).

    In training mode with `config.dropout` > 0, dropout acts on the embedding, on the attention weights and on the
    output of each residual branch (Radford et al. 2018, section 4.1). Its masks come from `dropout_seed` alone.

    `embedding: table` keeps positions as rows of the token table, as OpenAI's code for GPT-1: see `TableEmbedding`.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        if config.embedding == "table":
            self.token_embedding = TableEmbedding(config.vocab_size, config.context, config.n_embd, ops)
        else:
            self.token_embedding = TiedEmbedding(config.vocab_size, config.n_embd, ops)
            self.position_embedding = PositionEmbedding(config.context, config.n_embd)
        block = PreNormBlock if config.norm == "pre" else PostNormBlock
        self.blocks = nn.ModuleList(block(config, ops, config.window_of(layer)) for layer in range(config.n_layer))
        self.final_norm = AddLayerNorm(config.n_embd, ops) if config.norm == "pre" else NoNorm()

    def hidden(
        self,
        tokens: Tensor,
        *,
        dropout_seed: int | Tensor | None = None,
        checkpoint_activations: bool = False,
        cache: Cache | None = None,
        frozen_levels: int = 0,
        blocks: int | None = None,
    ) -> Tensor:
        """The final hidden states (B, T, N), which the output matrix turns into logits; arguments as for `forward`.

        With `blocks`, those after so many blocks: 0 is the embedding; before the last one of GPT-2's form they are the
        residual stream, which is not normalised.
        """
        length = tokens.shape[1]
        start = cache.length if cache else 0
        self._check_length(length, cache)
        assert cache is None or isinstance(cache, KeyValueCache), "the cache of another kind of model"
        if cache is not None:
            self._check_cache(length, cache)
        p, seeds = self._dropout(dropout_seed, tokens.device)
        if cache is not None and p:
            raise UserError("a cache of keys and values goes with the model in evaluation mode: call eval() first")
        layers = masks_of_layers(p, seeds, self.config.n_layer)
        caches = cache.layers(length) if cache else [None] * self.config.n_layer
        branch = None
        stream = self._embedded(tokens, start, p, layers[0].seed_at(Site.EMBEDDING))
        for level, (block, masks, kept) in enumerate(zip(self.blocks, layers, caches, strict=True), start=1):
            if blocks is not None and level > blocks:
                return stream if branch is None else stream + branch
            if frozen_levels == level:
                stream, branch = frozen(stream), None if branch is None else frozen(branch)
            if checkpoint_activations:
                branch, stream = recomputed(block, branch, stream, masks, self.ops, cache=kept)
            else:
                branch, stream = block(branch, stream, masks, cache=kept)
        if cache:
            cache.length += length
        normed: Tensor = self.final_norm(branch, stream, p, layers[-1].seed_at(Site.MLP_OUTPUT))[0]
        return frozen(normed, when=frozen_levels > self.config.n_layer)

    def _embedded(self, tokens: Tensor, start: int, p: float, seed: Tensor | None) -> Tensor:
        if isinstance(self.token_embedding, TableEmbedding):
            embedded: Tensor = self.token_embedding(tokens, start=start, p=p, seed=seed)
        else:
            embedded = self.position_embedding(tokens, table=self.token_embedding, start=start, p=p, seed=seed)
        return embedded

    def _check_cache(self, length: int, cache: KeyValueCache) -> None:
        start = cache.length
        if start + length > cache.capacity:
            raise UserError(f"{length} tokens do not fit the cache: it holds {start} of at most {cache.capacity}")
        if start and length > 1:
            raise UserError(f"{length} tokens at once after the {start} of the cache: give them one at a time")
