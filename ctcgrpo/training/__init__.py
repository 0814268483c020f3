"""The update: from episodes to turn samples, rows, loss and optimizer steps, on a subclass of TRL's GRPOTrainer."""
