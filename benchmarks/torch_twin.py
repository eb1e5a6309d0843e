"""The dense twin in plain PyTorch: transformers' GPT-NeoX and the trainer's recipe.

Float32, fused AdamW, clipping, no compilation. Start at `make_step`.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from memoryformer.training import experiment


def make_step(run: experiment.Experiment) -> Callable[[dict[str, np.ndarray]], float]:
    """Return a function of a batch: one update of its own weights, the loss in nats a token."""
    torch.manual_seed(run.train.seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = transformers.GPTNeoXForCausalLM(_config(run.model)).train()
    recipe = run.optimizer
    update = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(recipe.b1, recipe.b2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    # The same warm-up as the trainer's; the cosine after it costs nothing that counts.
    rise = torch.optim.lr_scheduler.LambdaLR(
        update, lambda step: min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    )

    def step(batch):
        inputs, targets = (
            torch.tensor(batch[name], dtype=torch.long)
            for name in ("inputs", "targets")
        )
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        update.step()
        rise.step()
        update.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _config(model):
    return transformers.GPTNeoXConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.embed_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=4 * model.embed_dim,
        max_position_embeddings=model.seq_len,
        rotary_pct=model.rotary_fraction,
        use_cache=False,
        attn_implementation="sdpa",
    )
