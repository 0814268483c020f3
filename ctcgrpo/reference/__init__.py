"""Reference of fields and metrics: `ctcgrpo fields` and `ctcgrpo metrics`."""
