"""The scripted user: a deterministic stand-in for an LLM that plays the user.

It is for tests, load and demonstrations. It matches word lists and patterns, so it is no measure of emotional skill. It rewards
what a scenario and its scene ask for, gives little for generic replies, and reports the reason of every state change.

    language.py    word lists, patterns and lines of one language (languages/*.yaml)
    grammar.py     checks whether an English sentence is well formed
    knowledge.py   what the user of a scenario cares about: from the record's `script`, or derived from its personas
    reading.py     features of a reply: its sentences, the details that it mentions, echoes, repetitions
    rules.py       the rules: how these features change the user's state
    backend.py     the user: sums the rules' findings, replies, ends the dialogue
"""

from ctcgrpo.simulator.scripted.backend import ScriptedBackend

__all__ = ["ScriptedBackend"]
