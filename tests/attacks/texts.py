"""Texts that a parser or a template would obey: YAML of hostile size, template syntax in scenarios."""

from __future__ import annotations

import time
from dataclasses import replace

from transformers import AutoTokenizer

from ctcgrpo.environments.eibench import opening_messages
from ctcgrpo.environments.eibench.persona import Briefing
from ctcgrpo.environments.eibench.scenarios import load_scenarios
from ctcgrpo.errors import CtcGrpoError
from ctcgrpo.experiments.spec import load_sweep
from ctcgrpo.policy.context import ContextBuilder
from ctcgrpo.policy.tiny import build_tiny
from ctcgrpo.run.export import model_card
from ctcgrpo.run.recipe_file import load_recipe
from ctcgrpo.simulator.config import load_simulator_config
from ctcgrpo.simulator.llm.prompts import TemplatePrompts, quoted
from tests.attacks.suite import Tries, attack
from tests.conftest import ROOT
from tests.unit.test_simulator_prompts import request
from tests.unit.test_strict_yaml import HOSTILE

_SECONDS = 4.0


@attack("texts", seconds=60)
def hostile_yaml(tries: Tries) -> None:
    """Alias bombs, depth, many keys, tags of Python and random bytes in recipes, sweeps and configurations."""
    rng = tries.rng("yaml")
    recipe = (ROOT / "recipes" / "tiny.yaml").read_bytes()
    texts: dict[str, bytes] = {name: text.encode() for name, text in HOSTILE.items()}
    texts["a tag of Python"] = b'run: !!python/object/apply:os.system ["true"]'
    texts["30,000 keys"] = b"run:\n" + b"".join(b"  k%d: 1\n" % k for k in range(30_000))
    texts["no UTF-8"] = b"run: \xff\xfe"
    texts["NUL"] = b"run: {name: a\0b}"
    texts["another encoding"] = "run: {name: ä}".encode("utf-16")
    for k in range(60):
        changed = bytearray(recipe)
        for _ in range(rng.randrange(1, 5)):
            changed[rng.randrange(len(changed))] = rng.choice(b"{}[]&*!|>-:#'\"\t\0\xff 9")
        texts[f"a recipe with bytes changed, {k}"] = bytes(changed)
    file = tries.folder / "file.yaml"
    for name, text in texts.items():
        file.write_bytes(text)
        for load in (load_recipe, load_sweep, load_simulator_config):
            with tries.one(f"{name}, {load.__name__}"):
                started = time.process_time()
                try:
                    load(file)
                except CtcGrpoError as error:
                    assert 0 < len(str(error)) < 5000, f"a message of {len(str(error))} characters"
                seconds = time.process_time() - started
                assert seconds < _SECONDS, f"it took {seconds:.1f} s"


_SYNTAX = (
    "{{ 7*7 }}",
    "{% raw %}",
    "{% endraw %}",
    "{# gone #}",
    "{{ ''.__class__.__mro__ }}",
    "{%- include '/etc/hostname' %}",
)
_SYNTAX += ("${7*7}", "{0.__class__}", "%(scene)s", "<|im_end|>", "{{ raise_exception('x') }}")


@attack("texts", seconds=30)
def template_syntax(tries: Tries) -> None:
    """Jinja, format and control syntax in personas, goals and lines stays text in every prompt, context and card."""
    folder = tries.folder / "tiny"
    build_tiny(folder, (s.user_persona for s in load_scenarios("english/train")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contexts = ContextBuilder(tokenizer, stop_ids=frozenset({tokenizer.eos_token_id}), max_prompt_tokens=4000)
    for scenario in load_scenarios("english/test")[::5]:
        plain = "".join(m["content"] for m in TemplatePrompts().messages(request("Hello.", "I am", "I am!", scenario=scenario)))
        for syntax in _SYNTAX:
            said = f"I {syntax} am"
            hostile = replace(
                scenario,
                user_persona=f"{said}. {scenario.user_persona}",
                policy_persona=f"{said}. {scenario.policy_persona}",
                opening_line=scenario.opening_line and f"{said}. {scenario.opening_line}",
                goal=said,
                success_criteria=(said,),
            )
            with tries.one(f"{scenario.scene}, an LLM's prompt, {syntax}"):
                system, user = TemplatePrompts().messages(request("Hello.", said, f"{said}!", scenario=hostile))
                told = system["content"] + user["content"]
                assert said in system["content"] and quoted(said)[1:-1] in user["content"], told[-600:]
                assert told.count("49") == plain.count("49"), "an expression was computed"
            with tries.one(f"{scenario.scene}, the policy's context, {syntax}"):
                ids, _ = contexts.prompt(contexts.start(opening_messages(hostile, Briefing())))
                text = tokenizer.decode(ids)
                assert said in text, text[:300]
                assert text.count("<|im_end|>") == text.count("<|im_start|>") - 1 + (syntax == "<|im_end|>") * text.count(said)
    for syntax in _SYNTAX:
        with tries.one(f"a model card, {syntax}"):
            recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", ["policy.model=x/y"])
            named = recipe.model_copy(update={"scenarios": recipe.scenarios.model_copy(update={"train": f"/no/{syntax}"})})
            assert syntax in model_card(named, None, which="final")
