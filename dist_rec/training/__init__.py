"""Ties data, tables and models together under torchrun: TorchRec and DeepSpeed in one step."""
