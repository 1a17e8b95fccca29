"""Secrets, which are never written down: not in logs, not in records of what was run."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from structured_tickets.base.errors import UsageError

SECRET_WORDS = frozenset(
    {
        "KEY",
        "APIKEY",
        "TOKEN",
        "PAT",
        "SECRET",
        "SECRETS",
        "PASSWORD",
        "PASSWD",
        "PASSPHRASE",
        "PWD",
        "PGPASSWORD",
        "CREDENTIAL",
        "CREDENTIALS",
    }
)
SHORTEST = 8
ORDINARY = re.compile(r"[a-z]+([-_ ][a-z]+)*|[A-Z]?[a-z]+|[A-Z]+(_[A-Z]+)*|[\d.:,-]+")
PASSWORD_IN_URL = re.compile(r"\b([A-Za-z][\w+.-]*:/{1,2}[^/\s:@]*):([^/\s@]+)@")  # one /: of a URL taken for a path
HIDDEN = "***"


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """The values that must not be written down, the longest first.

    Those of variables with a word such as KEY or TOKEN in their name (TOKENIZERS_PARALLELISM has none) and passwords of
    netrc and in URLs, of at least eight characters. Paths are not secret, nor are words and numbers, which would be
    hidden wherever they stand; but a password may be a word.
    """
    found = {
        value
        for name, value in environment.items()
        if (words := SECRET_WORDS & set(name.upper().split("_"))) and _is_secret(value, words)
    }
    in_urls = (match[2] for value in environment.values() for match in PASSWORD_IN_URL.finditer(value))
    found |= {p for p in (*in_urls, *_netrc_passwords(environment)) if len(p) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def _is_secret(value: str, words: Iterable[str]) -> bool:
    if len(value) < SHORTEST or value.startswith(("/", "~", "./", "../")) or Path(value[:255]).exists():
        return False
    return any(word.startswith("PASS") for word in words) or not ORDINARY.fullmatch(value)


def _netrc_passwords(environment: Mapping[str, str]) -> list[str]:
    try:
        hosts = netrc.netrc(environment.get("NETRC")).hosts
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return []
    return [password for _, _, password in hosts.values() if password]


def redacted(text: str) -> str:
    """The text with secrets of this process's environment, and passwords in URLs, hidden."""
    for secret in secrets_of(os.environ):
        text = text.replace(secret, HIDDEN)
    return PASSWORD_IN_URL.sub(rf"\1:{HIDDEN}@", text)


def refuse_secrets(words: Iterable[str]) -> None:
    """Refuse a command that holds a secret: commands are noted down for reports, and settings go to trackers.

    Raises:
        UsageError: The message names the flag.
    """
    flag = ""
    for word in words:
        flag = word.partition("=")[0] if word.startswith("--") else flag
        if redacted(word) != word:
            where = f"argument {redacted(flag)}" if flag else "the command"
            raise UsageError(
                f"{where}: contains a password or an API key, which would be saved with the run. Remove it from the "
                "command"
            )
