"""Text: where language models lie, the encoder, and the store of the vectors it makes."""
