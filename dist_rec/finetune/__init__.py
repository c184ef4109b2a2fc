"""`dist-rec finetune`: a config for a new domain, what it would train, and few-shot curves. Above `training`."""
