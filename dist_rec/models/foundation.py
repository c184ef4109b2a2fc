"""The multi-domain search and recommendation foundation model (Gong et al., CIKM'23).

    x      = E(U) (+) E(Q) (+) E(I)   (+) E(U)*E(I) (+) E(Q)*E(I) with `products` (ours)
                                      (+) m, the cosines of text vectors, with `text_match` (ours)
    x_hat  = W_k (x (+) E_Dk) + b_k
    logits = towers_k(gates_k(experts(x_hat)))   (+ term_k(m) with `text_match`)
    L      = sum_t weight_t L_t + weight * L_reg(x_hat) + embedding_l2 * mean_b sum_f |e_bf|^2

It takes looked-up embeddings and a `Batch` and knows neither tables, engines nor process groups:
what must be summed over ranks goes through the `Reduction` it is given. Every submodule is called in
every step, whatever the batch lacks, and no parameter is used outside its module, so the model
runs under any ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig, TaskConfig, check_names
from ..data.batch import Batch
from ..errors import UserError
from ..layers.adaptation import DomainAdaptation
from ..layers.divergence import js_divergence, mmd
from ..layers.encoders import EntityEncoder, UserEncoder
from ..layers.experts import ExpertBody
from ..layers.features import Columns, event_texts, row_texts
from ..layers.moves import place, take
from ..layers.per_domain import sort_by_domain
from ..layers.reduction import Reduction, full_precision, masked_means
from ..layers.sequence import HistoryEncoder
from ..layers.text_match import TextMatch, cosines, mean_directions
from ..schema import Feature, Schema
from .towers import Side, TwoTowers

# By role: its id, its text, and the columns of the sparse aspect.
Aspects = dict[str, tuple[str | None, str | None, Columns]]
# Each sequence of events: names of the ids that list them, and their text.
Histories = list[tuple[list[str], str | None]]

REGULARISER, EMBEDDING_L2, TOTAL = "regulariser", "embedding_l2", "loss"
# What its two-tower reading tells apart; no head.
TEXT = "text"


class FoundationModel(nn.Module):
    """Encoders, gates, domain adaptation, experts, heads and losses.

    Args:
        schema: the data set's.
        config: `model` of the config. `tasks` empty makes a head of every label.
        table_dims: embedding width by *table* name.
        text_width: D, width of a text vector; 0 leaves texts out.
        text_encoder: `(tokens [T, L], mask [T, L]) -> [T, D]`, co-trained; None reads
            `batch.text_vectors`.
        features: names of the features to use, of any role and kind.
        reduction: sums over ranks.

    Raises:
        UserError: a task names no label, or is called like an entry of the returned losses.
    """

    def __init__(
        self,
        schema: Schema,
        config: ModelConfig,
        table_dims: dict[str, int],
        text_width: int,
        text_encoder: nn.Module | None,
        features: Sequence[str],
        reduction: Reduction,
    ) -> None:
        super().__init__()
        self.config = config
        self.reduction = reduction
        self.num_domains = num_domains = len(schema.domains.names)
        self.tasks = tasks_of(schema, config)
        self.maxima = {task: schema.labels[spec.label].maximum for task, spec in self.tasks.items()}
        used = {name: schema.features[name] for name in schema.features if name in set(features)}
        dims = {n: table_dims[schema.table_of(n)] for n, f in used.items() if f.kind in ("id", "ids")}
        self.pooled = [n for n in dims if used[n].role != "history"]
        width = config.width

        def of(role: str, *kinds: str) -> dict[str, Feature]:
            return {n: f for n, f in used.items() if f.role == role and f.kind in kinds}

        def columns(role: str, without: Sequence[str] = ()) -> Columns:
            ids = {n: dims[n] for n in of(role, "id", "ids") if n not in without}
            return Columns(ids, {n: f.width for n, f in of(role, "dense").items()})

        texts = {role: list(of(role, "text")) if text_width else [] for role in ("user", "query", "item")}
        with_texts = bool(text_width) and config.history.use_text
        groups = history_groups(of("history", "ids"), of("history", "texts") if with_texts else {})
        self.histories = groups if config.history.kind != "none" else []
        self.user_texts = texts["user"]
        self.has_text = any(texts.values()) or any(text for _, text in self.histories)
        self.text_encoder = text_encoder if self.has_text else None
        if self.has_text:
            self.text_projection = nn.Linear(text_width, width)

        self.profile = columns("user")
        self.history_encoders = nn.ModuleList(
            [HistoryEncoder(config.history, width, [dims[n] for n in ids], bool(text)) for ids, text in self.histories]
        )
        profile_width = self.profile.width + width * len(self.user_texts)
        self.user = UserEncoder(profile_width, width * len(self.histories), width)

        self.aspects: Aspects = {}
        entities = {}
        for role in ("query", "item"):
            identity = next((n for n, f in of(role, "id").items() if f.aspect == "id"), None)
            text = texts[role][0] if texts[role] else None
            sparse = columns(role, without=[identity] if identity else [])
            self.aspects[role] = (identity, text, sparse)
            id_dim = dims[identity] if identity else 0
            entities[role] = EntityEncoder(
                config.gating, width, num_domains, id_dim, text is not None, sparse.width, config.dropout
            )
        self.entities = nn.ModuleDict(entities)

        self.uses_domains = config.gating == "domain" or config.adaptation.enabled
        if self.uses_domains:
            # E_D: one table, key of the domain gate and input of the adaptation.
            self.domains = nn.Embedding(num_domains, width)
            nn.init.normal_(self.domains.weight, std=width**-0.5)
        self.matched = _matches(self.aspects, self.histories, config)
        inputs = width * (5 if config.products else 3) + len(self.matched)
        self.dropout = nn.Dropout(config.dropout)
        if config.adaptation.enabled:
            self.adaptation = DomainAdaptation(num_domains, inputs, width, config.adaptation.width)
            inputs = self.adaptation.outputs
        self.body = ExpertBody(config.body, inputs, num_domains, len(self.tasks))
        if self.matched:
            match = config.text_match
            self.text_match = TextMatch(num_domains, len(self.matched), len(self.tasks), match.slope, match.speed)

    def forward(
        self, embeddings: dict[str, Tensor], batch: Batch, side: Side | None = None
    ) -> dict[str, Tensor | dict[str, Tensor]]:
        """One step's predictions and losses; or, asked for a side of the two-tower reading, its vectors.

        Args:
            embeddings: by feature: pooled `[B, dim]`, zeros where null, of the user's, query's and
                item's `id` and `ids` features; `[N, dim]`, all events in row order, of histories.
            batch: B rows, masked ones included.
            side: `user`, the direction of the query's text vector, or `item`, that of the item's.

        Returns:
            `loss`: scalar with the gradient; its mean over ranks is the global batch's loss.
            `losses`: detached scalars of the global batch, equal on all ranks: one for each task,
            `regulariser` and `embedding_l2` if there are, and `loss`, their weighted sum.
            `logits`: `[B]` by task, at least float32; anything on masked rows. An exported graph has these alone.
            `vectors`: of a side, and nothing else: `[B, D]` of length 1, or 0 where a row has no such text.
        """
        if side is not None:
            return {"vectors": {TEXT: self._side(batch, side)}}
        x, matches, domains = self._encode(embeddings, batch)
        order, sizes = sort_by_domain(batch.domain, self.num_domains)
        # A match dropped would read as a cosine of 0.
        x, matches = take(torch.cat([self.dropout(x), matches[:, : len(self.matched)]], 1), order), take(matches, order)
        if self.config.adaptation.enabled:
            x = self.adaptation(x, domains, sizes)
        regulariser = None if torch.compiler.is_exporting() else self._regulariser(x, batch, order)
        logits = self.body(x, sizes)
        if self.matched:
            logits = logits + self.text_match(matches, sizes)
        logits = full_precision(place(logits, order, batch.domain.shape[0]))
        by_task = dict(zip(self.tasks, logits.unbind(1), strict=True))
        if torch.compiler.is_exporting():
            return {"logits": by_task}
        norms = self._norms(embeddings, logits) if self.config.embedding_l2 else None
        loss, losses = self._losses(logits, batch, regulariser, norms)
        return {"loss": loss, "losses": losses, "logits": by_task}

    def _encode(self, embeddings: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B, 3H or 5H]` without matches, `[B, 2J]` of `cosines`, E_D `[K, H]` (`[K, 0]` where nothing reads it)."""
        dtype, device = self.body.towers.layers[0].weight.dtype, batch.domain.device
        lengths = batch.id_lengths()
        vectors = self._text_vectors(batch, dtype)
        # E_lm of the T distinct texts, [T, H]: one W_lm for query, item, user and history.
        texts = self.text_projection(vectors) if self.has_text else None
        domain = F.one_hot(batch.domain, self.num_domains).to(dtype)
        if self.uses_domains:
            domains = self.domains(torch.arange(self.num_domains, device=device))
        else:
            domains = domain.new_zeros(self.num_domains, 0)
        keys = domain @ domains

        profile, _ = self.profile.read(embeddings, lengths, batch, dtype)
        used = [row_texts(texts, batch.text_index[n], batch.text_lengths[n]) for n in self.user_texts]
        user = self.user(torch.cat([profile, *used], 1), self._histories(embeddings, lengths, texts, batch, profile))
        query = self._entity("query", embeddings, lengths, texts, batch, domain, keys)
        item = self._entity("item", embeddings, lengths, texts, batch, domain, keys)
        parts = [user, query, item]
        if self.config.products:
            parts += [user * item, query * item]
        return torch.cat(parts, 1), self._text_matches(vectors, batch, like=user), domains

    def _side(self, batch: Batch, side: Side) -> Tensor:
        name = self.aspects["query" if side == "user" else "item"][1]
        directions = F.normalize(full_precision(self._text_vectors(batch, self.text_projection.weight.dtype)), dim=1)
        return row_texts(directions, batch.text_index[name], batch.text_lengths[name])

    def _text_matches(self, vectors: Tensor, batch: Batch, like: Tensor) -> Tensor:
        """m and which of it is known, `[B, 2J]`, from the vectors of the T distinct texts, `[T, D]`."""
        if not self.matched:
            return like.new_zeros(*batch.domain.shape, 0)
        directions = F.normalize(vectors, dim=1)
        item = self.aspects["item"][1]
        items = row_texts(directions, batch.text_index[item], batch.text_lengths[item])
        others = [mean_directions(directions, batch.text_index[n], batch.text_lengths[n]) for n in self.matched]
        return cosines([(other, items) for other in others])

    def _text_vectors(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Vectors of the T distinct texts, `[T, D]`: stored ones, or the language model's."""
        if self.text_encoder is None:
            return batch.text_vectors.to(dtype)
        return self.text_encoder(batch.text_tokens, batch.text_mask).to(dtype)

    def _histories(
        self,
        embeddings: dict[str, Tensor],
        lengths: dict[str, Tensor],
        texts: Tensor | None,
        batch: Batch,
        like: Tensor,
    ) -> Tensor:
        """The histories' vectors side by side, `[B, G * H]`."""
        parts = [like.new_zeros(*batch.domain.shape, 0)]
        for (ids, text), encoder in zip(self.histories, self.history_encoders, strict=True):
            values, counts = [embeddings[n].to(like.dtype) for n in ids], [lengths[n] for n in ids]
            if text:
                values.append(event_texts(texts, batch.text_index[text]))
                counts.append(batch.text_lengths[text])
            parts.append(encoder(values, counts))
        return torch.cat(parts, 1)

    def _entity(
        self,
        role: str,
        embeddings: dict[str, Tensor],
        lengths: dict[str, Tensor],
        texts: Tensor | None,
        batch: Batch,
        domain: Tensor,
        keys: Tensor,
    ) -> Tensor:
        """E(Q) or E(I), `[B, H]`."""
        identity, text, sparse = self.aspects[role]
        inputs, present = {}, {}
        if identity:
            inputs["id"], present["id"] = embeddings[identity].to(domain.dtype), lengths[identity] > 0
        if text:
            inputs["text"] = row_texts(texts, batch.text_index[text], batch.text_lengths[text])
            present["text"] = batch.text_lengths[text] > 0
        if sparse.width:
            inputs["sparse"], present["sparse"] = sparse.read(embeddings, lengths, batch, domain.dtype)
        return self.entities[role](inputs, present, domain, keys)

    def _regulariser(self, x: Tensor, batch: Batch, order: Tensor) -> Tensor | None:
        spec = self.config.regulariser
        if spec.kind == "none":
            return None
        domain, valid = batch.domain[order], batch.valid[order]
        if spec.kind == "js":
            return js_divergence(x, domain, valid, self.num_domains, self.reduction)
        row = batch.row[order]
        return mmd(x, domain, valid, row, self.num_domains, spec.samples, spec.kernels, self.reduction)

    def _norms(self, embeddings: dict[str, Tensor], like: Tensor) -> Tensor:
        """Squared norm of each row's pooled embeddings, all features together, `[B]`."""
        return sum((embeddings[n].to(like.dtype).square().sum(1) for n in self.pooled), like.new_zeros(len(like)))

    def _losses(
        self, logits: Tensor, batch: Batch, regulariser: Tensor | None, norms: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss and what to report.

        Targets are label / maximum: a graded label is a soft target.
        """
        specs = list(self.tasks.values())
        targets = torch.stack([batch.labels[s.label] / self.maxima[t] for t, s in self.tasks.items()], 1)
        valid = torch.stack([batch.label_valid[s.label] for s in specs], 1) & batch.valid[:, None]
        terms = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        if norms is not None:
            terms, valid = torch.cat([terms, norms[:, None]], 1), torch.cat([valid, batch.valid[:, None]], 1)
        local, means = masked_means(terms, valid, self.reduction)
        names, weights = list(self.tasks), [s.weight for s in specs]
        if norms is not None:
            names, weights = [*names, EMBEDDING_L2], [*weights, self.config.embedding_l2]
        loss = sum(weight * term for weight, term in zip(weights, local.unbind(0), strict=True))
        total = sum(weight * mean for weight, mean in zip(weights, means.unbind(0), strict=True))
        losses = dict(zip(names, means.unbind(0), strict=True))
        if regulariser is not None:
            weight = self.config.regulariser.weight
            loss, total = loss + weight * regulariser, total + weight * regulariser.detach()
            losses[REGULARISER] = regulariser.detach()
        return loss, {**losses, TOTAL: total}


def tasks_of(schema: Schema, config: ModelConfig) -> dict[str, TaskConfig]:
    """The heads of a config, by name; without any, one for each label.

    Raises:
        UserError: a task names no label, or is called like an entry of the returned losses.
    """
    tasks = config.tasks or {label: TaskConfig(label=label) for label in schema.labels}
    faults = []
    for name, spec in tasks.items():
        faults += check_names(list(schema.labels), [spec.label], f"model.tasks.{name}.label")
        if name in (REGULARISER, EMBEDDING_L2, TOTAL):
            faults.append(f"model.tasks.{name}: this name is taken by an entry of the losses; choose another.")
    if faults:
        raise UserError("\n".join(faults))
    return tasks


def towers_of(schema: Schema, features: Sequence[str]) -> TwoTowers:
    """The texts of query and item: what can be found by an index for the model to rank.

    Raises:
        UserError: query or item have no text.
    """
    found = {
        role: next((n for n in schema.select(role, ("text",)) if n in features), None) for role in ("query", "item")
    }
    if lacking := [role for role, name in found.items() if name is None]:
        raise UserError(
            f"this foundation model reads no text of the {' and of the '.join(lacking)}, so it has no two towers: its "
            "experts look at user, query and item together. An index can serve the text vectors of queries and items."
        )
    why = "the experts look at user, query and item together; an index finds items by the cosine of text vectors alone"
    return TwoTowers(
        tasks=(TEXT,),
        user_features=(found["query"],),
        item_features=(found["item"],),
        exact={TEXT: False},
        why={TEXT: why},
        scale={TEXT: 1.0},
        bias={TEXT: 0.0},
    )


def _matches(aspects: Aspects, histories: Histories, config: ModelConfig) -> list[str]:
    """The J text features that are matched with the item's text."""
    if not config.text_match.enabled or aspects["item"][1] is None:
        return []
    query = aspects["query"][1]
    return ([query] if query else []) + [text for _, text in histories if text]


def history_groups(ids: dict[str, Feature], texts: dict[str, Feature]) -> Histories:
    """Which history features list the same events, and so are summed event by event.

    List columns of the raw data are aligned by the schema's contract; collected histories
    are where they collect under the same label. Each group is a sequence with an encoder of
    its own. A group has one text at most; further ones make groups of their own.
    """
    groups: dict[tuple, tuple[list[str], str | None]] = {}
    for name, feature in {**ids, **texts}.items():
        key: tuple = ("listed",) if feature.events is None else ("collected", feature.events.label)
        names, text = groups.get(key, ([], None))
        if name in ids:
            groups[key] = ([*names, name], text)
        elif text is None:
            groups[key] = (names, name)
        else:
            groups[*key, name] = ([], name)
    return list(groups.values())
