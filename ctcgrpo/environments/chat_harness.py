"""A harness of verifiers that answers with one model call, made in this process: no sandbox and no program to install."""

from __future__ import annotations

from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.dialects.chat import message_to_wire


class ChatHarness(vf.Harness[vf.HarnessConfig]):  # type: ignore[misc]
    """Without tools. The agent's timeouts limit a call; the model's endpoint is verifiers' own, which records it."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        prompt_messages = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else prompt or []
        messages: list[Any] = [*([vf.SystemMessage(content=system)] if system else []), *prompt_messages]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, timeout=None) as client:
            await client.chat.completions.create(model=ctx.model, messages=[message_to_wire(m) for m in messages])
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
