"""What changes a model's forward pass: attention layouts, key-value cache, head, sharding."""
