"""Models: plain modules that take looked-up embeddings and a `Batch` and return losses and logits."""
