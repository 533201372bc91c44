"""Whether the hub answers, in a bounded time: asking it for a file that cannot be had tries for half a minute."""

from __future__ import annotations

SECONDS = 2.0


def hub_silence(seconds: float = SECONDS) -> str | None:
    """Why the hub does not answer; None where it does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception as error:  # of the network: of a dozen classes, of httpx, ssl and the system
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
