"""The starter: its corpus is whole, its attention begins able to copy, and building it is reproducible."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctcgrpo.errors import PolicyError
from ctcgrpo.policy.builtin import STARTER_SECTIONS, build_builtin
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.persona import told
from ctcgrpo.policy.reasoning import parse_completion
from ctcgrpo.policy.starter import teach
from ctcgrpo.policy.starter.corpus import KINDS, Situation, load_corpus, long_lessons, short_lessons
from ctcgrpo.policy.starter.wiring import wire
from ctcgrpo.policy.tiny import build_model, build_tokenizer
from ctcgrpo.records import SCENES
from ctcgrpo.scenarios import load_scenarios
from ctcgrpo.simulator.scripted.language import load_language

SITUATIONS = [
    Situation(s.scene, told(s.policy_persona, STARTER_SECTIONS), (s.opening_line or "The kettle sings.",))
    for s in load_scenarios("english/train")
]


def test_the_corpus_is_whole_and_varied() -> None:
    corpus = load_corpus()
    for scene in SCENES:
        lines = corpus.lines[scene]
        assert len(lines) >= 150 and len({line.text for line in lines}) == len(lines)
        for line in lines:
            assert re.search(rf"\b{line.thing}\b", line.text), line
            assert not set(line.around) & set(re.findall(r"[a-z]+", line.text.lower())), line
        assert len(set(corpus.replies[scene]["plain"])) >= 60 and len(set(corpus.replies[scene]["poor"])) >= 20
    assert KINDS["engage"] < 0.5  # it has something to learn


def test_no_held_out_scenario_is_in_the_corpus() -> None:
    """Neither a line nor a run of five words of one."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[k : k + 5]) for k in range(len(words) - 4)}

    held_out: set[tuple[str, ...]] = set()
    for s in load_scenarios("english/test", "test"):
        for text in (s.user_persona, s.opening_line, s.policy_persona, *(d["line"] for d in s.script["details"])):
            held_out |= runs(text)
    corpus = load_corpus()
    for scene in SCENES:
        for text in (line.text for line in corpus.lines[scene]):
            assert len(runs(text) & held_out) < 2, text


def test_lessons_speak_in_sentences_and_take_up_what_was_said() -> None:
    language = load_language("en")
    kinds: Counter[str] = Counter()
    sentences = sound = 0
    for lesson in [*islice(short_lessons(SITUATIONS, 0), 400), *islice(long_lessons(SITUATIONS, 0), 100)]:
        for _, reply in lesson.exchanges:
            kinds[reply.kind] += 1
            parsed = parse_completion(reply.completion, "stop")
            assert parsed.faults == () and parsed.reasoning == reply.thought and parsed.reply == reply.text
            assert "{" not in reply.completion
            spoken = language.sentences(reply.text)
            sentences += len(spoken)
            sound += sum(map(language.is_sound, spoken))
    assert sound / sentences > 0.9
    assert kinds["plain"] + kinds["poor"] + kinds["name"] > kinds["engage"]
    assert all(
        a == b for a, b in zip(islice(long_lessons(SITUATIONS, 3), 20), islice(long_lessons(SITUATIONS, 3), 20), strict=True)
    )


def test_wired_attention_learns_to_copy_in_a_moment() -> None:
    """From 30 batches of noise that repeats itself; without the wiring it does not begin to."""
    tokenizer = build_tokenizer(["some words to begin with"], vocab_size=512)

    def copies(wired: bool) -> float:
        model = build_model(tokenizer, hidden_size=128, layers=2, heads=4)
        torch.manual_seed(0)
        if wired:
            wire(model)
        teach.teach(model, teach.curriculum(tokenizer, SITUATIONS, seed=0), steps=30)
        noise = torch.randint(0, len(tokenizer), (64, 16))
        with torch.no_grad():
            chosen = model(input_ids=torch.cat([noise, noise], 1)).logits[:, 16:-1].argmax(-1)
        return (chosen == noise[:, 1:]).float().mean().item()

    assert copies(wired=False) < 0.2
    assert copies(wired=True) > 0.5


def test_building_it_is_reproducible_and_a_seed_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in {"REPEAT": 2, "NAMING": 2, "SHORT": 2, "LONG": 2}.items():
        monkeypatch.setattr(teach, name, count)
    heard: list[str] = []
    random.seed(1)
    state = torch.get_rng_state()
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_builtin("builtin/starter", tmp_path / folder, seed, say=heard.append)
        random.random(), torch.rand(1)
    torch.set_rng_state(state)
    a, b, c = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    stop = {tokenizer.eos_token_id}
    builder = ContextBuilder(tokenizer, stop_ids=stop, max_prompt_tokens=288, persona_sections=STARTER_SECTIONS)
    builder.check([*load_scenarios("english/train"), *load_scenarios("english/test", "test")])
    with pytest.raises(PolicyError, match="builtin/startr.*did you mean.*builtin/starter"):
        build_builtin("builtin/startr", tmp_path / "d", 0)


def test_what_a_policy_is_told_of_its_role() -> None:
    persona = "### Background\nYou are Ann.\n\n### Known facts\n1. It rains.\n\n### Core goal\nStay.\n"
    assert told(persona, None) == persona
    assert told(persona, ("Core goal", "Background")) == "### Background\nYou are Ann.\n\n### Core goal\nStay."
    with pytest.raises(PolicyError, match="'Aim'.*Background, Known facts, Core goal"):
        told(persona, ("Aim",))
    with pytest.raises(PolicyError, match="no sections"):
        told("You are Ann.", ("Aim",))
