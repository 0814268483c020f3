"""The scripted user: a deterministic stand-in for an LLM that plays the user.

It is for tests, load and demonstrations, not a judge of emotional skill: it reads with word lists and patterns. It rewards what a
scenario and its scene ask for, gives little for generic replies, and reports the reason of every change.

    language.py    word lists, patterns and lines of one language (languages/*.yaml)
    grammar.py     whether an English sentence is well formed
    knowledge.py   what the user of a scenario cares about: from the record's `script`, or derived from its personas
    reading.py     what a reply does: sentences, details it picks up, echoes, repetitions
    rules.py       how that changes the user's state, a few lines a rule
    backend.py     the user: sums the rules, answers, ends the dialogue
"""

from ctcgrpo.simulator.scripted.backend import ScriptedBackend

__all__ = ["ScriptedBackend"]
