"""A run as an HTML page (`ctcgrpo report`), in the terminal (`show`), and as a conversation (`chat`)."""
