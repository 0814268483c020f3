"""The policy's side: loading a model, its reasoning, and the context that each of its turns is sampled from."""
