"""Shards in and out: blocks, builder, canonical order, stream, batches. Knows no model."""
