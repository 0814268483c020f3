"""A run as an HTML page (`ctcgrpo report`) and in the terminal (`show`)."""
