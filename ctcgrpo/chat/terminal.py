"""A conversation with one or more policies in the terminal."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ctcgrpo.chat.conversation import Conversation, Reply, awaits_opening, note_of
from ctcgrpo.chat.opening import Talk, in_words
from ctcgrpo.chat.speaker import converse
from ctcgrpo.errors import PolicyEngineError
from ctcgrpo.util.terminal import print_line

_SIDE_BY_SIDE = 100  # terminal width from which the replies of two policies are side by side


async def talk_in_terminal(
    talk: Talk, console: Console, ask: Callable[[], str], *, seed: int, reasoning: bool = False, rounds: int | None = None
) -> Conversation:
    """Talk until an empty line, the end of input, or `rounds` replies. `ask` reads the person's next line, and raises EOFError at
    the end of input. Gives the conversation. Raises PolicyEngineError where the policy opens and cannot."""
    conversation = talk.start
    _introduce(talk, console)
    while rounds is None or len(conversation.replies) < rounds:
        line = ""
        if not awaits_opening(conversation):
            try:
                line = ask().strip()  # blocking: nothing else runs meanwhile, and Ctrl-C ends it at once
            except EOFError:
                break
            line = line or _opening(talk, conversation, console)
            if not line:
                break
        try:
            with console.status(Text(f"{' and '.join(conversation.policies)}: sampling")):
                conversation = await converse(conversation, line, talk.speakers, seed)
        except PolicyEngineError as error:
            if awaits_opening(conversation):  # no other line of the person would help
                raise
            print_line(console, f"error: {error}", "red")
            continue
        console.print(_replies(conversation.policies, conversation.replies[-1], reasoning, console.width))
    return conversation


def _introduce(talk: Talk, console: Console) -> None:
    scenario = talk.scenario
    if scenario is not None:
        console.print(Panel(Text(scenario.user_persona), title=Text(f"you, in {scenario.id} ({scenario.scene})")))
        if scenario.opening_line:
            print_line(console, f"An empty first line says the scenario's: {scenario.opening_line}", "dim")
    elif not talk.start.role:
        print_line(console, "The policy has no role; --scenario ID gives it one.", "dim")
    print_line(console, f"{in_words(talk.sampling)}. An empty line ends the conversation.\n", "dim")


def _opening(talk: Talk, conversation: Conversation, console: Console) -> str:
    """The scenario's first line, at the start of a dialogue."""
    line = "" if talk.scenario is None or conversation.lines else talk.scenario.opening_line
    if line:
        print_line(console, f"You: {line}")
    return line


def _replies(policies: Sequence[str], replies: Sequence[Reply], reasoning: bool, width: int) -> Table:
    wide = len(replies) > 1 and width >= _SIDE_BY_SIDE
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in replies if wide else (0,):
        table.add_column(ratio=1)
    cells = [_reply(name, reply, reasoning) for name, reply in zip(policies, replies, strict=True)]
    for row in [cells] if wide else [[cell] for cell in cells]:
        table.add_row(*row)
    return table


def _reply(name: str, reply: Reply, reasoning: bool) -> Text:
    text = Text(f"{name}: ", style="dim")
    if reasoning and reply.reasoning:
        text.append(f"({reply.reasoning})\n", style="dim italic")
    text.append(reply.text or "(nothing)", style="bold cyan not dim")
    text.append(f"\n{note_of(reply)}\n", style="dim")
    return text
