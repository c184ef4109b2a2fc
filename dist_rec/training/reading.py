"""How patiently data is read."""

from __future__ import annotations

from ..config import DataConfig
from ..data.remote import Retry


def retry_of(data: DataConfig) -> Retry:
    return Retry(data.retries, data.retry_seconds, data.timeout_seconds)
