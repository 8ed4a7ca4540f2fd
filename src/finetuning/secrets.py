"""Secrets in a text: tokens of many vendors by their form, and what the environment says is one.

The forms are detect-secrets' (Yelp), less its detectors that guess by entropy or by a word nearby:
those find secrets in every tokenizer. Ours are the ones that it does not know.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

# Names of environment variables whose values are secret, and the length from which they are
# looked for: `true` stands in every text.
SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
MIN_LENGTH = 8  # characters

# Of detect_secrets.plugins: module.Class
DETECTORS = (
    "aws.AWSKeyDetector",
    "azure_storage_key.AzureStorageKeyDetector",
    "basic_auth.BasicAuthDetector",
    "discord.DiscordBotTokenDetector",
    "github_token.GitHubTokenDetector",
    "gitlab_token.GitLabTokenDetector",
    "jwt.JwtTokenDetector",
    "mailchimp.MailchimpDetector",
    "npm.NpmDetector",
    "openai.OpenAIDetector",
    "private_key.PrivateKeyDetector",
    "pypi_token.PypiTokenDetector",
    "sendgrid.SendGridDetector",
    "slack.SlackDetector",
    "square_oauth.SquareOAuthDetector",
    "stripe.StripeDetector",
    "telegram_token.TelegramBotTokenDetector",
    "twilio.TwilioKeyDetector",
)

OWN = {
    "Hugging Face token": r"\b(hf|api_org)_[A-Za-z0-9]{16,}",
    "GitHub token": r"\bgithub_pat_[A-Za-z0-9_]{20,}",
    "OpenAI or Anthropic key": r"\bsk-(proj|svcacct|admin|ant)-[A-Za-z0-9_-]{16,}",
    "Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "wandb key": r"(?i:wandb|api\.wandb\.ai)[^\n]{0,40}?\b[0-9a-f]{40}\b"
    r"|\bwandb_v\d_[A-Za-z0-9_]{20,}",
    "password in a URL": r"://[^/\s:@]*:[^/\s@]+@",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
}


class Secret(NamedTuple):
    """Where in a text a secret stands, and what it is."""

    start: int
    end: int
    kind: str


def find_secrets(text: str) -> Iterator[Secret]:
    """Every secret that is recognised, in no order; one may be found by several forms."""
    for kind, form in forms().items():
        for match in form.finditer(text):
            yield Secret(*match.span(), kind)
    for name, value in secret_values().items():
        for match in re.finditer(re.escape(value), text):
            yield Secret(*match.span(), f"value of {name}")


def redacted(text: str) -> str:
    """The text with `[kind of secret]` for each."""
    kept: list[str] = []
    begin = 0
    for start, end, kind in sorted(
        find_secrets(text), key=lambda secret: (secret.start, -secret.end)
    ):
        if start >= begin:
            kept += [text[begin:start], f"[{kind}]"]
        begin = max(begin, end)
    return "".join([*kept, text[begin:]])


def forms() -> dict[str, re.Pattern[str]]:
    """{kind of secret: how it looks}."""
    import importlib

    found = {kind: re.compile(form) for kind, form in OWN.items()}
    for place in DETECTORS:
        module, _, name = place.partition(".")
        detector = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)
        for number, form in enumerate(detector.denylist):
            found[f"{detector.secret_type}" + (f" ({number + 1})" if number else "")] = form
    return found


def secret_values() -> dict[str, str]:
    """{name: value} of what the environment, and the Hub's own file, keep secret."""
    from huggingface_hub import get_token

    values = {name: value for name, value in os.environ.items() if SECRET_VARIABLE.search(name)}
    values["the Hub's token"] = get_token() or ""
    return {name: value for name, value in values.items() if is_secret(value)}


def is_secret(value: str) -> bool:
    """Long enough to mean something, and not the path of a file that holds the secret."""
    return len(value) >= MIN_LENGTH and not value.startswith(("/", "~", "."))
