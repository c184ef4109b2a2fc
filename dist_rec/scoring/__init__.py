"""Scores of raw rows without the training system: these files are copied into every scoring bundle as they are.

They import nothing but torch, fbgemm_gpu and numpy, and each other. `dist_rec` itself uses what is in them, so that
there is one way to name a text, to spread ids and to read a raw row.
"""
