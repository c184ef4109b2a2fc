"""Embedding tables under TorchRec: what they are, how they are planned and sharded. Knows no text."""
