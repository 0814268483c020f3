"""What fields and metrics mean: `ctcgrpo fields` and `ctcgrpo metrics`."""
