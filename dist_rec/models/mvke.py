"""MVKE (Xu et al., KDD'22): users by virtual kernels, tags that weigh them, several objectives; and its baselines.

    E_u^k  = expert_k(kernel k's attention over the user's fields)     `layers.virtual_kernels`; P_t vectors for task t
    E_T    = tower(the item's fields)
    w      = softmax_k(E_T . kernel k)                                 over the kernels that task t shares or owns
    logit  = scale * sum_k w_k <E_u^k, E_T>                            `score.kind: dot`; of unit vectors: `parts`
             scale * cos(sum_k w_k E_u^k, E_T)                         `cosine`
    L      = sum_t weight_t BCE_t + embedding_l2 * mean_b sum_f |e_bf|^2

The sum is one inner product, of concat_k(E_u^k) and concat_k(w_k E_T), which an index can serve (`side`); `two_towers`
says of which options that is the score. A task that is `given` another has the product of both probabilities for its
score, and its loss is over all rows with the other's label, where its own label counts as 0 wherever the other's is
(ESMM). Baselines put other vectors in the place of E_u^k: one for each task (`layers.task_towers`), whose w is 1, or
interests that the item weighs (`layers.multi_interest`).

A tag is the item of a row: what the schema says of it. Queries and domains are not read.

It takes looked-up embeddings and a `Batch` and knows neither tables, engines nor process groups: what must be summed
over ranks goes through the `Reduction` it is given. Every submodule is called in every step, whatever the batch lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MVKEConfig
from ..data.batch import Batch
from ..errors import UserError
from ..layers.contrastive import unit
from ..layers.fields import FieldEncoder, Fields, History
from ..layers.item_tower import ItemTower
from ..layers.multi_interest import MultiInterest, label_aware_weights
from ..layers.reduction import Reduction, full_precision, masked_means
from ..layers.task_towers import TaskTowers
from ..layers.virtual_kernels import CrossedKernels, KernelExperts, KernelGate
from ..schema import Feature, Schema
from .foundation import EMBEDDING_L2, TOTAL, history_groups
from .objectives import both, targets_of, tasks_of
from .towers import Side, TwoTowers


class MVKE(nn.Module):
    """Fields, towers, gates, scores and losses.

    Submodules, by which presets freeze: `text_encoder`, `text_projection`, `user_fields`, `item_fields`; `kernels`,
    `experts`, `gate`, `crossed`, or `interests` or `towers`; `item`, `item_gate`.

    Args:
        schema: the data set's.
        config: `model` of the config. `tasks` empty makes a task of every label.
        table_dims: embedding width by *table* name.
        text_width: D, width of a text vector; 0 leaves texts out.
        text_encoder: `(tokens [T, L], mask [T, L]) -> [T, D]`, co-trained; None reads `batch.text_vectors`.
        features: names of the features to use, of any kind; those of queries are left alone.
        reduction: sums over ranks.

    Raises:
        UserError: a task names no label, or is called like an entry of the returned losses; the user or the item has
            no feature.
    """

    def __init__(
        self,
        schema: Schema,
        config: MVKEConfig,
        table_dims: dict[str, int],
        text_width: int,
        text_encoder: nn.Module | None,
        features: Sequence[str],
        reduction: Reduction,
    ) -> None:
        super().__init__()
        self.config, self.reduction = config, reduction
        self.tasks = tasks_of(schema, config)
        self.maxima = {task: schema.labels[spec.label].maximum for task, spec in self.tasks.items()}
        used = {name: schema.features[name] for name in schema.features if name in set(features)}
        dims = {n: table_dims[schema.table_of(n)] for n, f in used.items() if f.kind in ("id", "ids")}
        width, user = config.width, config.user

        def of(role: str, *kinds: str) -> dict[str, Feature]:
            return {n: f for n, f in used.items() if f.role == role and f.kind in kinds}

        def encoder(role: str, histories: list[History]) -> FieldEncoder:
            ids = {n: dims[n] for n in of(role, "id", "ids")}
            dense = {n: f.width for n, f in of(role, "dense").items()}
            texts = of(role, "text") if text_width else {}
            by_event = user.kind == "multi_interest"
            return FieldEncoder(ids, dense, list(texts), histories, dims, config.history, width, by_event)

        with_texts = bool(text_width) and config.history.use_text
        groups = history_groups(of("history", "ids"), of("history", "texts") if with_texts else {})
        histories = [History(*group) for group in groups] if config.history.kind != "none" else []
        self.pooled = [n for n in dims if used[n].role in ("user", "item")]
        self.user_fields, self.item_fields = encoder("user", histories), encoder("item", [])
        if faults := _lacking(bool(self.user_fields.names or histories), bool(self.item_fields.names), schema.name):
            raise UserError("\n".join(faults))
        self.has_text = bool(self.user_fields.texts or self.item_fields.texts or any(h.text for h in histories))
        self.text_encoder = text_encoder if self.has_text else None
        if self.has_text:
            self.text_projection = nn.Linear(text_width, width)

        num_fields, kernels, gate = len(self.user_fields.names), config.kernels, config.gate
        self.owned = _owned(config, list(self.tasks))
        if user.kind == "mvke":
            count = max(stop for _, stop in self.owned) if self.owned else kernels.shared
            self.kernels = nn.Embedding(count, width)
            nn.init.normal_(self.kernels.weight, std=kernels.init_std)
            attention = (kernels.activation, kernels.combine, kernels.scaled, kernels.maps_std)
            self.experts = KernelExperts(count, num_fields, width, *attention, user.hidden, user.dropout)
            self.gate = KernelGate(width, gate.project, kernels.activation, gate.scaled, gate.kind)
            if kernels.crossed:
                self.crossed = CrossedKernels(count, width)
        elif user.kind == "multi_interest":
            self.interests = MultiInterest(user.interests, num_fields, width, user.hidden, user.dropout)
        else:
            self.towers = TaskTowers(user, num_fields, width, len(self.tasks))
        vectors = 1 if config.item.shared else len(self.tasks)
        self.item = ItemTower(config.item, kernels, len(self.item_fields.names), width, vectors)
        if config.item.kind == "vke_vkg":
            self.item_gate = KernelGate(width, gate.project, kernels.activation, gate.scaled, gate.kind)

    def forward(
        self, embeddings: dict[str, Tensor], batch: Batch, side: Side | None = None
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """One step's predictions and losses, or one side's vectors.

        Args:
            embeddings: by feature: pooled `[B, dim]`, zeros where null, of the user's and item's `id` and `ids`
                features; `[N, dim]`, all events in row order, of histories. Of a side alone, its features'.
            batch: B rows, masked ones included.
            side: whose vectors are asked for; labels are then not read, nor is the other side.

        Returns:
            `loss`: scalar with the gradient; its mean over ranks is the global batch's loss.
            `losses`: detached scalars of the global batch, equal on all ranks: one for each task, `embedding_l2` if
            there is one, and `loss`, their weighted sum.
            `logits`: `[B]` by task, at least float32; anything on masked rows. An exported graph has these alone.
            Of a side, at least float32: `vectors`: `[B, P_t * d]` by task; and what those of items are made of:
            `tags` `[B, d]` and `weights` `[B, P_t]` by task.
        """
        lengths, texts = batch.id_lengths(), self._texts(batch)
        user = item = None
        if side != "item":
            user = self.user_fields(embeddings, lengths, batch, texts, self._dtype)
        if side != "user":
            item, _ = self.item_fields(embeddings, lengths, batch, texts, self._dtype)
        if side == "user":
            return {"vectors": self._user_vectors(user)}
        if side == "item":
            return self._item_vectors(item)
        logits = self._logits(user, item)
        by_task = dict(zip(self.tasks, logits.unbind(1), strict=True))
        if torch.compiler.is_exporting():
            return {"logits": by_task}
        norms = None
        if self.config.embedding_l2:
            squares = (embeddings[n].to(logits.dtype).square().sum(1) for n in self.pooled)
            norms = sum(squares, logits.new_zeros(len(logits)))
        loss, losses = self._losses(logits, batch, norms)
        return {"loss": loss, "losses": losses, "logits": by_task}

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.item.parameters()).dtype

    def _texts(self, batch: Batch) -> Tensor | None:
        """E_lm of the T distinct texts, `[T, d]`: one map for users, items and histories."""
        if not self.has_text:
            return None
        if self.text_encoder is None:
            vectors = batch.text_vectors
        else:
            vectors = self.text_encoder(batch.text_tokens, batch.text_mask)
        return self.text_projection(vectors.to(self._dtype))

    def _logits(self, user: tuple[Fields, list[Fields]], item: Fields) -> Tensor:
        """`[B, T]`."""
        kernels = self._kernels()
        if self.config.kernels.crossed:
            kernels = self.crossed(kernels, user[0].mean(), item.mean())
        parts, (experts, item_kernels) = self._parts(user, kernels), self.item(item)
        logits = []
        for number in range(len(self.tasks)):
            own, one = parts[number], self._vector_of(number)
            tag = experts[:, one].mean(1)
            weights = self._weights(number, own, tag, kernels)
            if self.config.item.kind == "vke_vkg":
                of_user = self.item_gate(own.mean(1), item_kernels[one])
                values = self.item_gate.value(experts[:, one])
                tag = torch.bmm(of_user[:, None], values)[:, 0]
            logits.append(self._score(own, weights, tag))
        logits = self.config.score.scale * torch.stack(logits, 1)
        columns = list(logits.unbind(1))
        for number, spec in enumerate(self.tasks.values()):
            if spec.given is not None:
                columns[number] = both(logits[:, list(self.tasks).index(spec.given)], logits[:, number])
        return torch.stack(columns, 1)

    def _kernels(self) -> Tensor | None:
        """W_VK, `[K, d]`."""
        if self.config.user.kind != "mvke":
            return None
        return self.kernels(torch.arange(self.kernels.num_embeddings, device=self.kernels.weight.device))

    def _parts(self, user: tuple[Fields, list[Fields]], kernels: Tensor | None) -> list[Tensor]:
        """By task the vectors that an item weighs, `[B, P_t, d]`."""
        fields, events = user
        kind = self.config.user.kind
        if kind == "mvke":
            experts, _ = self.experts(kernels, fields)
            values = self.gate.value(experts)
            return [self._of_task(number, values) for number in range(len(self.tasks))]
        if kind == "multi_interest":
            return [self.interests(fields, events)] * len(self.tasks)
        return [vectors[:, None] for vectors in self.towers(fields).unbind(1)]

    def _of_task(self, number: int, of_kernels: Tensor) -> Tensor:
        """Of `[.., K, d]` what belongs to the kernels that a task shares or owns."""
        start, stop = self.owned[number]
        shared = self.config.kernels.shared
        return torch.cat([of_kernels[..., :shared, :], of_kernels[..., start:stop, :]], -2)

    def _vector_of(self, number: int) -> int:
        """Which of the item's vectors a task reads."""
        return 0 if self.config.item.shared else number

    def _weights(self, number: int, parts: Tensor, tag: Tensor, kernels: Tensor | None) -> Tensor:
        """w, `[B, P_t]`."""
        kind = self.config.user.kind
        if kind == "mvke":
            return self.gate(tag, self._of_task(number, kernels))
        if kind == "multi_interest":
            return label_aware_weights(parts, tag, self.config.user.sharpness)
        return torch.ones_like(parts[:, :, 0])

    def _score(self, parts: Tensor, weights: Tensor, tag: Tensor) -> Tensor:
        """Of a task, without scale, `[B]`; parts `[B, P, d]`, weights `[B, P]`, tag `[B, d]`."""
        parts, weights, tag = full_precision(parts), full_precision(weights), full_precision(tag)
        if self.config.score.kind == "cosine":
            mixed = torch.bmm(weights[:, None], parts)[:, 0]
            return (unit(mixed) * unit(tag)).sum(1)
        if self.config.score.kind == "parts":
            parts, tag = _units(parts), unit(tag)
        return (weights * torch.bmm(parts, tag[:, :, None])[:, :, 0]).sum(1)

    def _user_vectors(self, user: tuple[Fields, list[Fields]]) -> dict[str, Tensor]:
        found = {}
        for task, parts in zip(self.tasks, self._parts(user, self._kernels()), strict=True):
            parts = full_precision(parts)
            if self.config.score.kind == "parts":
                parts = _units(parts)
            elif self.config.score.kind == "cosine":
                # The length of the mixture by an even gate, which is the length where there is one vector.
                lengths = parts.mean(1, keepdim=True).square().sum(2, keepdim=True)
                parts = parts * lengths.clamp_min(torch.finfo(lengths.dtype).tiny).rsqrt()
            found[task] = parts.flatten(1)
        return found

    def _item_vectors(self, item: Fields) -> dict[str, dict[str, Tensor]]:
        kernels, (experts, _) = self._kernels(), self.item(item)
        tags, gates = {}, {}
        for number, task in enumerate(self.tasks):
            one = self._vector_of(number)
            tag = experts[:, one].mean(1)
            if self.config.user.kind == "mvke":
                weights = self.gate(tag, self._of_task(number, kernels))
            else:
                count = self.config.user.interests if self.config.user.kind == "multi_interest" else 1
                weights = tag.new_full((tag.shape[0], count), 1 / count)
            if self.config.item.kind == "vke_vkg":
                tag = self.item_gate.value(experts[:, one]).mean(1)
            tag = full_precision(tag)
            tags[task] = tag if self.config.score.kind == "dot" else unit(tag)
            gates[task] = full_precision(weights)
        vectors = {task: (gates[task][:, :, None] * tags[task][:, None]).flatten(1) for task in tags}
        return {"vectors": vectors, "tags": tags, "weights": gates}

    def _losses(self, logits: Tensor, batch: Batch, norms: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss and what to report. Targets are label / maximum."""
        targets, known = targets_of(self.tasks, self.maxima, batch)
        terms = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        valid = known & batch.valid[:, None]
        names, weights = list(self.tasks), [spec.weight for spec in self.tasks.values()]
        if norms is not None:
            terms = torch.cat([terms, norms[:, None].to(terms.dtype)], 1)
            valid = torch.cat([valid, batch.valid[:, None]], 1)
            names, weights = [*names, EMBEDDING_L2], [*weights, self.config.embedding_l2]
        local, means = masked_means(terms, valid, self.reduction)
        loss = sum(weight * term for weight, term in zip(weights, local.unbind(0), strict=True))
        total = sum(weight * mean for weight, mean in zip(weights, means.unbind(0), strict=True))
        return loss, {**dict(zip(names, means.unbind(0), strict=True)), TOTAL: total}


def two_towers(schema: Schema, config: MVKEConfig, features: Sequence[str]) -> TwoTowers:
    """What an index can serve of a model of these `features`."""
    tasks, why = tasks_of(schema, config), {}
    virtual = config.user.kind == "mvke"
    for task, spec in tasks.items():
        counts = {"mvke": config.kernels.shared + config.own_kernels(task), "multi_interest": config.user.interests}
        several = counts.get(config.user.kind, 1) > 1
        reasons = []
        if config.kernels.crossed:
            reasons.append("kernels.crossed makes the kernels depend on user and item together")
        if config.item.kind == "vke_vkg" and config.item.kernels > 1:
            reasons.append("item.kind vke_vkg makes the item's vector depend on the user")
        if config.user.kind == "multi_interest" and several:
            reasons.append("user.kind multi_interest weighs interests by user and item together")
        if config.score.kind == "cosine" and several:
            reasons.append("score.kind cosine divides by the length of the mixed vector, which depends on the item")
        if spec.given is not None:
            reasons.append(f"the score is the product of two probabilities, {spec.given}'s and the vectors' own")
        if reasons:
            why[task] = "; ".join(reasons)

    def side(*roles: str) -> tuple[str, ...]:
        return tuple(name for name in features if schema.features[name].role in roles)

    return TwoTowers(
        tasks=tuple(tasks),
        user_features=side("user", "history"),
        item_features=side("item"),
        exact={task: task not in why for task in tasks},
        why=why,
        scale=dict.fromkeys(tasks, config.score.scale),
        bias=dict.fromkeys(tasks, 0.0),
        kernels={task: config.kernels.shared + config.own_kernels(task) for task in tasks} if virtual else {},
        one_kernel=virtual and config.gate.kind == "argmax",
    )


def _units(parts: Tensor) -> Tensor:
    return unit(parts.flatten(0, 1)).view_as(parts)


def _owned(config: MVKEConfig, tasks: Sequence[str]) -> list[tuple[int, int]]:
    """Start and stop, among all kernels, of those of each task alone, which follow the shared ones."""
    found: list[Any] = []
    start = config.kernels.shared
    for task in tasks:
        stop = start + config.own_kernels(task)
        found.append((start, stop))
        start = stop
    return found


def _lacking(user: bool, item: bool, name: str) -> list[str]:
    faults = []
    for has, what, roles in ((user, "user", "user or history"), (item, "item", "item")):
        if not has:
            faults.append(
                f"model.kind mvke needs features of the {what} (role {roles}), and the run reads none of schema "
                f"{name!r}: see data.exclude_features, and text.mode where they are texts"
            )
    return faults
