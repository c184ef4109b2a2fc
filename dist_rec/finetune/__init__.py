"""Starting from a foundation: what it was, what of it fits, what new domains begin as, and what stays as it was.

`origin`, `foundation`, `warm_start` and `freeze` are what `training` asks when `finetune.run` is set; `derive`,
`describe` and `curve` stand above `training` and make runs of it.
"""
