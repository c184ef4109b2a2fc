"""What of a data set a config reads, and how patiently."""

from __future__ import annotations

from ..config import Config, DataConfig
from ..data.remote import Retry
from ..schema import Schema


def used_features(schema: Schema, config: Config) -> list[str]:
    """The features that this config's model reads, in schema order."""
    text = config.text.mode != "none"
    history = config.model.history.kind != "none"
    history_text = text and history and config.model.history.use_text
    used = []
    for name, feature in schema.features.items():
        if name in config.data.exclude_features:
            continue
        if feature.kind == "text" and not text or feature.kind == "texts" and not history_text:
            continue
        if feature.role == "history" and not history:
            continue
        used.append(name)
    return used


def retry_of(data: DataConfig) -> Retry:
    return Retry(data.retries, data.retry_seconds, data.timeout_seconds)
