"""Load pretrained vision models, from a folder or the hub, without running code of the
repository."""

from pathlib import Path
from typing import Any

from dreambooth_moslora.errors import UserError, format_error

HUB_TIMEOUT_SEC = 5
"""Of the one request that tells whether the hub can be reached."""


def load_pretrained(kind: Any, name: str | Path, flag: str, **options: Any) -> Any:
    """Load `kind.from_pretrained(name)`; one of the hub from the cache if the hub is unreachable.

    kind: a class of transformers
    name: a folder or an id of the hub
    flag: the setting that named it, for the error
    options: further arguments of `from_pretrained`

    Raises UserError when it cannot be loaded.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        is_local = Path(name).is_dir() or not is_hub_answering(str(name))
        return kind.from_pretrained(
            name, local_files_only=is_local, trust_remote_code=False, **options
        )
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"{flag} {name} is not here and cannot be fetched: connect to the hub once, or name a "
            "folder"
        ) from error
    except Exception as error:  # files of other models may raise any error
        reason = format_error(f"{type(error).__name__} {error}")
        raise UserError(f"{flag} {name} cannot be read as a {kind.__name__}: {reason}") from error


def is_hub_answering(model_id: str) -> bool:
    """Return whether the hub answers a request for a model, with any status.

    There is one request: transformers repeats its own for each file of a model, for minutes. None
    is made with HF_HUB_OFFLINE, or for a name that is no id of the hub, such as a path.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        url = hf_hub_url(model_id, "config.json")
        get_session().head(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT_SEC)
    except Exception:  # the client passes on the HTTP library's errors
        return False
    return True


def load_frozen(kind: Any, name: str | Path, flag: str, device: Any, **options: Any) -> Any:
    """Load a complete model onto the torch device, for inference; the other arguments are those of
    `load_pretrained`.

    Raises UserError for missing weights, which transformers would fill with random ones.
    """
    model, info = load_pretrained(kind, name, flag, output_loading_info=True, **options)
    if missing_keys := sorted(info["missing_keys"]):
        raise UserError(f"{flag} {name} is no {kind.__name__}: it has no {missing_keys[0]}")
    return model.requires_grad_(False).eval().to(device)
