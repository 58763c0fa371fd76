"""Credentials in settings: recognised by name and by form, in one place, and never written anywhere."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"

# Names of settings that hold a credential; `eos_token` and `num_tokens` do not.
_NAME = re.compile(
    r"(^|_|-)(hub|hf|api|access|auth|bearer|private|use_auth|wandb|refresh|session)_?-?(token|key)s?$"
    r"|^token$|^authorization$|secret|passw(or)?d|passphrase|credential|api_?-?key",
    re.IGNORECASE,
)
# Keys of Hugging Face, OpenAI and others, GitHub, GitLab, Slack, AWS and Google; JSON web tokens; a URL's password.
_FORM = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bapi_org_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{12,}|\bgh[pousr]_[A-Za-z0-9]{12,}"
    r"|\bgithub_pat_\w{12,}|\bglpat-[\w-]{12,}|\bxox[abprs]-[\w-]{8,}|\bAKIA[0-9A-Z]{12,}|\bAIza[\w-]{20,}"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|\bBearer\s+[\w.~+/-]{8,}=*|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)


def without_secrets(text: str) -> str:
    """The text with whatever has the form of a credential hidden."""
    return _FORM.sub(HIDDEN, text)


def redacted(value: Any, name: str = "") -> Any:
    """The value with every credential in it hidden: by the name of a setting, or by its own form."""
    if isinstance(value, Mapping):
        return {key: redacted(each, str(key)) for key, each in value.items()}
    if value and isinstance(value, str | bytes) and _NAME.search(name):
        return HIDDEN
    if isinstance(value, str):
        return without_secrets(value)
    if type(value) in (list, tuple, set):
        return type(value)(redacted(each, name) for each in value)
    return value


class WritesNoSecrets:
    """For configurations: neither `to_dict`, which trackers and config.yaml get, nor a pickle holds a credential."""

    def to_dict(self) -> dict[str, Any]:
        return redacted(super().to_dict())  # type: ignore[misc]  # of TrainingArguments

    def __getstate__(self) -> dict[str, Any]:
        return redacted(self.__dict__)
