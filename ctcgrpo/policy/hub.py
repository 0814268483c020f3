"""What the Hub's library raises, in a line that may be printed."""

from huggingface_hub import get_token

from ctcgrpo.llm_client.reasons import without_secrets


def hub_reason(error: BaseException) -> str:
    """The first line of an error, without the Hub's token: a server may quote the request that it refuses."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    token = get_token()
    return without_secrets(first, [token]) if token else first
