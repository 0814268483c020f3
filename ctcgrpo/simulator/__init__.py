"""The user's side: a stateless HTTP server that plays the user, its client, and its backends."""
