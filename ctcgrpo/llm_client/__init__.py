"""Calls to hosted language models, for simulator and factory: endpoints, account, store."""
