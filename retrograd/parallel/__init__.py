"""Several processes that share the steps of one run, on torch.distributed: see `retrograd.parallel.group`."""
