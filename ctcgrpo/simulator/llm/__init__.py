"""The user, played by any LLM behind an OpenAI-compatible endpoint.

prompts/LANGUAGE/    the LLM's prompts: rules, scenes/SCENE, persona, dialogue, moment (Jinja templates)
prompts.py           a turn as chat messages, laid out for prefix caches; the policy's text is quoted data
official.py          the same from the authors' own code, in a folder that the user names
answers.py           parses an answer into numbers and a line, or gives the reason why it is invalid
backend.py           the user: calls the LLM, parses, asks for a corrected answer, averages

The calls themselves, their endpoints, account and store are in ctcgrpo/llm_client.
"""

from ctcgrpo.simulator.llm.backend import LlmBackend

__all__ = ["LlmBackend"]
