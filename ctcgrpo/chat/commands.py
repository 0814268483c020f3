"""`ctcgrpo chat`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ctcgrpo.errors import RecipeError
from ctcgrpo.run.startup import announce_loading
from ctcgrpo.util.terminal import Terminal, log_line

_ROUNDS = 8
_TALK, _PLAY = "You are the user", "You are the policy"


def chat(
    policy: Annotated[
        str | None, typer.Option(help="Talk with this policy: a model's folder (checkpoints/RUN/final) or a Hub model.")
    ] = None,
    scenario: Annotated[str | None, typer.Option(help="Scenario id; default: the first one; with --policy none.")] = None,
    scenarios: Annotated[
        str | None, typer.Option(help="Scenarios: a path, a bundled pack, or a dataset; default: english/test, or the run's.")
    ] = None,
    instructions: Annotated[
        str | None,
        typer.Option(help="How to reply: eibench, short, none, or a file; default: eibench, or the run's."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of replies; default: 8; with --policy no limit.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Simulator configuration (configs/simulator); default: the scripted user.", rich_help_panel=_PLAY),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(help="URL of a running simulator server; repeat for replicas.", rich_help_panel=_PLAY),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also talk with what the run started from, side by side.", rich_help_panel=_TALK)
    ] = False,
    base: Annotated[str | None, typer.Option(help="The other policy of --compare.", rich_help_panel=_TALK)] = None,
    web: Annotated[bool, typer.Option("--web", help="In a browser instead of the terminal.", rich_help_panel=_TALK)] = False,
    host: Annotated[
        str, typer.Option(help="With --web: interface; all but loopback need CTCGRPO_PAGE_TOKEN.", rich_help_panel=_TALK)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --web: port; 0 picks a free one.", rich_help_panel=_TALK)] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Default: the run's; 0 is greedy.", rich_help_panel=_TALK)
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1, help="Default: the run's.", rich_help_panel=_TALK)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of a reply; default: the run's.", rich_help_panel=_TALK)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same lines then get the same replies.", rich_help_panel=_TALK)
    ] = None,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="Show the policy's reasoning.", rich_help_panel=_TALK)] = False,
) -> None:
    """Talk with a trained policy, or play the policy's role yourself against the simulated user.

    With --policy you are the user, and the policy replies as it was trained to. Without it you reply, and see how each reply
    changes the user's anger and trust.
    """
    talking = {"--compare": compare, "--base": base, "--web": web, "--temperature": temperature, "--top-p": top_p}
    talking |= {"--max-new-tokens": max_new_tokens, "--seed": seed, "--reasoning": reasoning}
    if policy is None:
        _refuse(talking, "needs --policy; try --policy checkpoints/RUN/final")
        _play(scenario, scenarios or "english/test", config, url or [], rounds or _ROUNDS, instructions or "eibench")
        return
    _refuse({"--config": config, "--url": url}, "with --policy you are the user, and nobody is simulated; leave it out")
    if base is not None and not compare:
        raise RecipeError(f"--base {base}: needs --compare")
    if web and rounds is not None:
        raise RecipeError(f"--rounds {rounds}: --web has no limit; leave one of the two out")
    announce_loading(f"talking with {policy}")
    import asyncio

    from transformers.utils import logging as transformers_logging

    from ctcgrpo.chat.opening import Choice, open_talk
    from ctcgrpo.chat.terminal import talk_in_terminal

    transformers_logging.disable_progress_bar()
    choice = Choice(policy, compare, base, scenario, scenarios, instructions, temperature, top_p, max_new_tokens)
    talk = open_talk(choice, lambda text: log_line(text, sys.stderr))
    number = secrets.randbits(31) if seed is None else seed
    try:
        if web:
            from ctcgrpo.chat.web import serve_chat

            serve_chat(talk, host, port, log_line, seed=number, reasoning=reasoning)
        else:
            session = talk_in_terminal(
                talk, Terminal(80), lambda: input("You: "), seed=number, reasoning=reasoning, rounds=rounds
            )
            asyncio.run(session)
    except KeyboardInterrupt:
        print()
    finally:
        talk.close()


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raises RecipeError for the first option that is given."""
    for name, value in options.items():
        if value is not None and value is not False and value != []:
            raise RecipeError(f"{name}: {why}")


def _play(scenario: str | None, scenarios: str, config: Path | None, urls: list[str], rounds: int, instructions: str) -> None:
    """A person plays the policy's role."""
    import asyncio

    from ctcgrpo.chat.as_policy import chat as play_as_policy
    from ctcgrpo.chat.as_policy import find_scenario
    from ctcgrpo.environments.eibench.persona import Briefing
    from ctcgrpo.environments.eibench.scenarios import load_set
    from ctcgrpo.policy.instructions import load_instructions
    from ctcgrpo.simulator.choice import chosen_simulator

    found = load_set(scenarios, "test")
    for line in found.report():
        log_line(line, sys.stderr)
    chosen = find_scenario(found.scenarios, scenario)
    briefing = Briefing(instructions=load_instructions(instructions))
    console = Terminal(80)
    with chosen_simulator(config, urls, console) as simulator:
        asyncio.run(play_as_policy(chosen, briefing, simulator, console, lambda: input("You: "), rounds=rounds))
