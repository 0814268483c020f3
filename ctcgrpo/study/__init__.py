"""Studies: the same recipe under several settings of the credit, with seeds and measure fixed before the first run."""
