"""The decoder-only language model, dense or with mixture-of-experts layers.

Modules and parameters answer one to one to Hugging Face's Mixtral (every layer MoE) and Qwen3-MoE (``qk_norm``,
dense and MoE layers mixed). Below ``blocks.{i}.`` is ``model.layers.{i}.``:

    epmoe                                Mixtral                           Qwen3-MoE
    embed.weight                         model.embed_tokens.weight         same
    norm.weight                          model.norm.weight                 same
    head.weight (absent when tied)       lm_head.weight                    same
    attention_norm.weight                input_layernorm.weight            same
    attention.{q,k,v,o}_proj.weight      self_attn.{q,k,v,o}_proj.weight   same
    attention.{q,k}_norm.weight          -                                 self_attn.{q,k}_norm.weight
    ffn_norm.weight                      post_attention_layernorm.weight   same
    ffn.{gate,up,down}_proj.weight       -                                 mlp.{gate,up,down}_proj.weight
    moe.router.weight                    block_sparse_moe.gate.weight      mlp.gate.weight
    moe.experts.w_in[e, :, :F] (gate)    block_sparse_moe.experts.{e}.w1   mlp.experts.{e}.gate_proj
    moe.experts.w_in[e, :, F:] (up)      block_sparse_moe.experts.{e}.w3   mlp.experts.{e}.up_proj
    moe.experts.w_out[e]                 block_sparse_moe.experts.{e}.w2   mlp.experts.{e}.down_proj
    shared.{gate,up,down}_proj.weight    -                                 -

Expert matrices are stored ``[in, out]``, the transpose of theirs; every other matrix is ``[out, in]`` as theirs.
``moe.every`` is Qwen3-MoE's ``decoder_sparse_step``, ``moe.first_dense = n`` its ``mlp_only_layers = [0 .. n-1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from epmoe.config import ModelConfig, MoEConfig, causality_problem
from epmoe.errors import ConfigError, EpmoeError
from epmoe.models.accelerators import Accelerators
from epmoe.models.attention import Attention, AttentionInputs, KVCache, attention_inputs
from epmoe.models.init import init_weights
from epmoe.models.layers import Embedding, KeyedDropout, Linear, RMSNorm, SwiGLU
from epmoe.models.sizes import expert_width, is_moe_layer
from epmoe.moe.build import build_moe_layer
from epmoe.moe.layer import MoELayer
from epmoe.moe.recompute import KEEP, CheapTensors, Recompute, Remake, Replay, plain
from epmoe.types import RouterReport, TokenContext

RecomputeMode = Literal["none", "selective", "full"]
"""Keep everything; keep all but what is cheap to make again; keep the input and what was decided."""
BlockFunction = Callable[..., tuple[Tensor, RouterReport | None]]


class Block(nn.Module):
    """One layer: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    The feed-forward part is ``ffn`` in a dense block; in an MoE block it is ``moe`` plus, where there are shared
    experts, ``shared`` with weight 1.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig | None,
        *,
        layer: int,
        vocab_size: int,
        seed: int,
        accelerators: Accelerators,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.d_model, model.norm_eps, accelerators.rms_norm)
        self.attention = Attention(model, layer=layer, accelerators=accelerators)
        self.attention_dropout = KeyedDropout(model.dropout, site=2 * layer + 1, seed=seed)
        self.ffn_norm = RMSNorm(model.d_model, model.norm_eps, accelerators.rms_norm)
        self.ffn: SwiGLU | None = None
        self.moe: MoELayer | None = None
        self.shared: SwiGLU | None = None
        if moe is not None and is_moe_layer(moe, layer):
            width = expert_width(model, moe)
            self.moe = build_moe_layer(
                moe, d_model=model.d_model, d_ff=width, layer=layer, seed=seed, vocab_size=vocab_size
            )
            if moe.shared_experts:
                self.shared = SwiGLU(model.d_model, moe.shared_experts * width)
        else:
            self.ffn = SwiGLU(model.d_model, model.d_ff)
        self.ffn_dropout = KeyedDropout(model.dropout, site=2 * layer + 2, seed=seed)
        self.recompute: RecomputeMode = "none"
        """What a training pass does not keep for its backward pass."""
        self.compiled: BlockFunction | None = None
        """``run`` for training passes, if they are compiled."""

    def forward(
        self, x_BSD: Tensor, inputs: AttentionInputs, ctx: TokenContext | None, cache: KVCache | None
    ) -> tuple[Tensor, RouterReport | None]:
        """x ``[B, S, D]`` -> ``[B, S, D]`` and, from an MoE block, the router's report."""
        if not (self.training and torch.is_grad_enabled()) or cache is not None:
            return self.run(x_BSD, inputs, ctx, cache)
        run = self.compiled or self.run
        if self.recompute == "full":
            # Draws are keyed, so that there is no state of a generator to bring back.
            return checkpoint(  # type: ignore[no-any-return]
                run, x_BSD, inputs, ctx, None, Replay(), use_reentrant=False, preserve_rng_state=False
            )
        if self.recompute == "selective" and self.compiled is None:
            with CheapTensors() as cheap:
                return run(x_BSD, inputs, ctx, None, cheap)
        return run(x_BSD, inputs, ctx, None)

    def run(
        self,
        x_BSD: Tensor,
        inputs: AttentionInputs,
        ctx: TokenContext | None,
        cache: KVCache | None = None,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, RouterReport | None]:
        """What ``forward`` returns, computed once."""
        remake = recompute.remake
        x_BSD, normed_BSD = self.attend(x_BSD, inputs, ctx, cache, remake)
        if self.ffn is not None:
            return self.add(x_BSD, self.ffn(normed_BSD, remake), ctx), None
        assert self.moe is not None  # the constructor sets one of the two
        beside = None if self.shared is None else partial(self.shared, remake=remake)
        out_BSD, report = self.moe(normed_BSD, ctx, beside, recompute)
        return self.add(x_BSD, out_BSD, ctx), report

    def attend(
        self,
        x_BSD: Tensor,
        inputs: AttentionInputs,
        ctx: TokenContext | None,
        cache: KVCache | None = None,
        remake: Remake = plain,
    ) -> tuple[Tensor, Tensor]:
        """What comes before the experts: the residual stream after attention, and its norm."""
        mixed_BSD = self.attention(remake(self.attention_norm, x_BSD), inputs, cache, remake)
        x_BSD = x_BSD + self.attention_dropout(mixed_BSD, ctx)
        return x_BSD, remake(self.ffn_norm, x_BSD)

    def add(self, x_BSD: Tensor, out_BSD: Tensor, ctx: TokenContext | None) -> Tensor:
        """What comes after the feed-forward part: its result into the residual stream."""
        left_BSD: Tensor = self.ffn_dropout(out_BSD, ctx)
        return x_BSD + left_BSD


class Decoder(nn.Module):
    """The language model: token ids in, logits of the next token out.

    Built on a real device it is initialised; built under ``torch.device("meta")`` it has only shapes, and
    ``model.to_empty(device=...)`` followed by ``init_weights(model, seed)`` gives the same values.

    Args:
        model: Shape of the decoder.
        moe: Its mixture-of-experts layers; None = dense.
        vocab_size: Entries of the vocabulary, V.
        seed: Key of the initial weights and of every draw in training.
        cross_document: False limits attention to the token's own document (``ctx.segment_BS``). RoPE depends on
            distances alone, so a document then means the same wherever it lies in the window.
        accelerators: From ``choose_accelerators``, which reads ``model.attention`` and ``model.norm``; parameters
            and their names are the same with and without. None = PyTorch alone.

    Raises:
        ConfigError: ``model`` asks for ``flash`` or ``apex`` and ``accelerators`` does not have it.
        ValueError: The router is not causal and ``moe.allow_non_causal`` is false.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig | None,
        *,
        vocab_size: int,
        seed: int,
        cross_document: bool = True,
        accelerators: Accelerators | None = None,
    ) -> None:
        super().__init__()
        if problem := causality_problem(moe):
            raise ValueError("; ".join(problem))
        accelerators = accelerators or Accelerators()
        _require(model, accelerators)
        self.config, self.moe_config = model, moe
        self.vocab_size = vocab_size
        self.cross_document = cross_document
        self.embed = Embedding(vocab_size, model.d_model)
        self.embed_dropout = KeyedDropout(model.dropout, site=0, seed=seed)
        self.blocks = nn.ModuleList(
            Block(model, moe, layer=i, vocab_size=vocab_size, seed=seed, accelerators=accelerators)
            for i in range(model.num_layers)
        )
        self.norm = RMSNorm(model.d_model, model.norm_eps, accelerators.rms_norm)
        self.head = None if model.tie_embeddings else Linear(model.d_model, vocab_size)
        if not self.embed.weight.is_meta:
            init_weights(self, seed)

    def forward(
        self, token_BS: Tensor, ctx: TokenContext | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, list[RouterReport]]:
        """Token ids ``[B, S]`` -> logits ``[B, S, V]`` and the report of every MoE layer, in order.

        Args:
            token_BS: int64 ids below V. Padding belongs at a sequence's end, where no real token looks at it.
            ctx: What else is known about the tokens.
            cache: Keys and values of the tokens before these; the new ones are added to it.

        Raises:
            EpmoeError: If the cache is full, or documents are to be kept apart in a cached pass.
        """
        start = 0
        segment_BS = None if self.cross_document or ctx is None else ctx.segment_BS
        if cache is not None:
            if segment_BS is not None:
                raise EpmoeError(
                    "a key/value cache holds one document per sequence, got segment_BS",
                    fix="leave segment_BS or the cache out",
                )
            cache.check_room(token_BS.size(1))
            start = cache.length
        if ctx is None or ctx.token_BS is None:  # a router may go by the ids
            ctx = replace(ctx or TokenContext(), token_BS=token_BS)
        x_BSD = self.embed_dropout(self.embed(token_BS), ctx)
        inputs = attention_inputs(self.config, x_BSD, start=start, segment_BS=segment_BS)
        reports: list[RouterReport] = []
        for block in self.blocks:
            x_BSD, report = block(x_BSD, inputs, ctx, cache)
            if report is not None:
                reports.append(report)
        if cache is not None:
            cache.advance(token_BS.size(1))
        head_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x_BSD), head_VD), reports

    def moe_layers(self) -> Iterator[MoELayer]:
        """The mixture-of-experts layers, first to last."""
        for block in self.blocks:
            if isinstance(block, Block) and block.moe is not None:
                yield block.moe


def _require(model: ModelConfig, accelerators: Accelerators) -> None:
    missing = [
        key
        for key, lacks in (
            ("attention=flash", model.attention == "flash" and accelerators.attend is None),
            ("norm=apex", model.norm == "apex" and accelerators.rms_norm is None),
        )
        if lacks
    ]
    if missing:
        raise ConfigError(
            f"the model is to have {' and '.join(missing)}, but was given no such kernel",
            fix="Decoder(..., accelerators=choose_accelerators(model, device=..., dtype=...))",
        )
