"""Attacks on the product, of a kind that users, policies, endpoints, files and machines make: `python -m tests.attacks`."""
