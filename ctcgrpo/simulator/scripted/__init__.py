"""The scripted user: a deterministic stand-in for an LLM that plays the user.

It is for tests, load and demonstrations, not a judge of emotional skill: it reads with word lists and patterns. It looks
for what a scenario and its scene ask for, is hard to please with empty words, and says why it moved.

    language.py    word lists, patterns and lines of one language (languages/*.yaml)
    grammar.py     whether an English sentence hangs together
    knowledge.py   what the user of a scenario cares about: from the record's `script`, or derived from its personas
    reading.py     what a reply does: sentences, details it picks up, echoes, repetitions
    rules.py       what that does to the user, a few lines a rule
    backend.py     the user: sums the rules up, answers, stops
"""

from ctcgrpo.simulator.scripted.backend import ScriptedBackend

__all__ = ["ScriptedBackend"]
