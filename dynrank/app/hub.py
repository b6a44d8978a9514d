"""Whether Hugging Face's hub can be asked: where it cannot, its own libraries try again for half a minute."""

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError


def hub_answers(name: str, revision: str | None = None) -> bool:
    """Whether the hub answers to a request for a model, whatever it says; it is asked once."""
    try:
        get_hf_file_metadata(hf_hub_url(name, constants.CONFIG_NAME, revision=revision))
    except HfHubHTTPError:
        return True
    # The hub's library has changed its HTTP library with its major versions, and each has errors of its own.
    except Exception:
        return False
    return True
