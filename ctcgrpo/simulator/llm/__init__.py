"""The user, played by any LLM behind an OpenAI-compatible endpoint.

prompts/LANGUAGE/    what the LLM is told: rules, scenes/SCENE, persona, dialogue, moment (Jinja templates)
prompts.py           a turn as chat messages, laid out so that prefixes repeat; what the policy said is quoted data
official.py          the same from the authors' own code, in a folder that the user names
answers.py           what came back, as numbers and a line; or what is wrong with it
backend.py           the user: asks, reads, asks once more for a corrected answer, averages

The calls themselves, their endpoints, account and store are in ctcgrpo/llm_client.
"""

from ctcgrpo.simulator.llm.backend import LlmBackend

__all__ = ["LlmBackend"]
