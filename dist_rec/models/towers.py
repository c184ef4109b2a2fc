"""The two-tower reading of a trained model: what an index of inner products can serve of it.

Such a model has `forward(embeddings, batch, side="user" | "item") -> {"vectors": {task: float32 [B, D_task]}}`; through
`forward`, because ZeRO-3 gathers parameters only there. Of task t, with u and i what the two sides say of a user and an
item,

    logit_t(u, i) = scale_t * <u_t, i_t> + bias_t        where `exact`, to rounding; elsewhere an approximation
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Side = Literal["user", "item"]


@dataclass(frozen=True)
class TwoTowers:
    """What each side reads, and how the two vectors of a task make the model's score.

    Attributes:
        tasks: one pair of vectors each: an mvke's tasks; unisrec ("next",); foundation ("text",).
        user_features, item_features: which features of the run's (schema, features) each side reads.
        exact: by task, whether the model's own score is scale * <u, i> + bias.
        why: by task where it is not, why, in a sentence.
        scale, bias: by task.
        kernels: by task, K: of how many vectors the user's is, which an item weighs. Side `item` then has `tags`
            `[B, d]` and `weights` `[B, K]` too, whose products are its vector; empty where there is no such thing.
        one_kernel: whether an item weighs one of them 1 and the others 0.
    """

    tasks: tuple[str, ...]
    user_features: tuple[str, ...]
    item_features: tuple[str, ...]
    exact: dict[str, bool]
    why: dict[str, str]
    scale: dict[str, float]
    bias: dict[str, float]
    kernels: dict[str, int] = field(default_factory=dict)
    one_kernel: bool = False
