"""Calls to hosted language models: endpoints, account, store; what simulator and factory share."""
