"""Load pretrained vision models, from a folder or the hub, without running code of the
repository."""

from pathlib import Path
from typing import Any

from dreambooth_moslora.errors import UserError, format_error


def load_pretrained(kind: Any, name: str | Path, flag: str, **options: Any) -> Any:
    """Load `kind.from_pretrained(name)`.

    kind: a class of transformers
    name: a folder or an id of the hub
    flag: the setting that named it, for the error
    options: further arguments of `from_pretrained`

    Raises UserError when it cannot be loaded.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, HFValidationError) as error:
        raise UserError(
            f"{flag} {name} is not here and cannot be fetched: connect to the hub once, or name a "
            "folder"
        ) from error
    except Exception as error:  # files of other models may raise any error
        reason = format_error(f"{type(error).__name__} {error}")
        raise UserError(f"{flag} {name} cannot be read as a {kind.__name__}: {reason}") from error


def load_frozen(kind: Any, name: str | Path, flag: str, device: Any, **options: Any) -> Any:
    """Load a complete model onto the torch device, for inference; the other arguments are those of
    `load_pretrained`.

    Raises UserError for missing weights, which transformers would fill with random ones.
    """
    model, info = load_pretrained(kind, name, flag, output_loading_info=True, **options)
    if missing_keys := sorted(info["missing_keys"]):
        raise UserError(f"{flag} {name} is no {kind.__name__}: it has no {missing_keys[0]}")
    return model.requires_grad_(False).eval().to(device)
