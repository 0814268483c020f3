"""What a policy can be trained in: each module has an `Environment`."""
