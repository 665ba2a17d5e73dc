"""minillm: how language models are trained, in plain PyTorch that is meant to be read."""
