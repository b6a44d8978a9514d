"""Whether Hugging Face's hub can be asked: where it cannot, its own libraries try again for half a minute."""

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError


def hub_answers(name: str, revision: str | None = None, *, repo_type: str = "model") -> bool:
    """Whether the hub answers to a request for a model or a data set, whatever it says; it is asked once."""
    try:
        get_hf_file_metadata(hf_hub_url(name, constants.CONFIG_NAME, repo_type=repo_type, revision=revision))
    except HfHubHTTPError:
        return True
    # The hub's library has changed its HTTP library with its major versions, and each has errors of its own.
    except Exception:
        return False
    return True
