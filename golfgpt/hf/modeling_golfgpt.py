"""A golfgpt model for transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from golfgpt.hf.configuration_golfgpt import GolfGPTConfig
from golfgpt.model.gpt import GPT
from golfgpt.model.kv_cache import KVCache


@dataclass
class GolfGPTOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    """(B, T, vocab_size), float32, with the softcap."""
    cache: KVCache | None = None


class GolfGPTForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT with the interface of transformers. Parameters in float32 give golfgpt's logits; in another dtype they are
    rounded to it and everything but the norms is computed in it."""

    config_class = GolfGPTConfig
    base_model_prefix = "model"
    _is_stateful = True  # the cache cannot be cropped, so there is no assisted generation

    def __init__(self, config: GolfGPTConfig):
        super().__init__(config)
        self.model = GPT(config.golf_config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> GolfGPTOutput:
        """Logits of input_ids (B, T). `labels` (B, T) are shifted here; -100 is ignored. `cache` as in GPT.forward.
        `logits_to_keep`: only of the last tokens; 0: of all.

        Nothing is masked: no token sees later ones, so padding on the right changes no logits before it. Raises
        ValueError for padding on the left, which the tokens after it would see.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError(
                "attention_mask hides tokens on the left of others, which golfgpt models do not support; pad on the "
                "right to score, and generate from one prompt at a time or from prompts of equal length"
            )
        hidden = self.model(input_ids, dtype=self.dtype, cache=cache)
        logits = self.model.logits(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return GolfGPTOutput(loss=loss, logits=logits, cache=cache)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of the next forward. Tokens attend to the last `max_position_embeddings`, as in golfgpt sample."""
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "attention_mask hides tokens of a prompt, which golfgpt models do not support; generate from one "
                "prompt at a time or from prompts of equal length"
            )
        window = self.config.max_position_embeddings
        if use_cache and cache is None:
            cache = KVCache(window)
        ids = input_ids[:, -1:] if cache is not None and cache.seen else input_ids[:, -window:]
        return {"input_ids": ids, "cache": cache, "logits_to_keep": 1}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # prepare_inputs_for_generation makes the cache

    @staticmethod
    def _reorder_cache(cache: KVCache, beams: Tensor) -> KVCache:
        layers = {i: (k[beams], v[beams]) for i, (k, v) in cache.layers.items()}
        return KVCache(cache.window, cache.seen, layers, {name: x[beams] for name, x in cache.last.items()})
