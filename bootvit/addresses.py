"""Addresses may hold a user, a password or a token: nothing that is shown or written down holds it too."""

from __future__ import annotations

import re
from urllib.parse import unquote

MASK = "***"
NOBODY = "anonymous"  # as gs://anonymous@BUCKET asks without credentials
SECRETS = {"secrets": True}  # the context of a `model_dump` that keeps them: for use, never for writing
HARMLESS = (  # parameters of an address that are no secret; any other one's value is masked
    *("region", "scheme", "endpoint_override", "allow_bucket_creation", "allow_bucket_deletion"),
    *("tls_ca_file_path", "retry_limit_seconds", "charset", "sslmode", "driver"),
)
USER = re.compile(
    r"(?<!sqlite)(?<!file)(?<!hf):(/++)(?!anonymous@[^@\s]*(?:\s|$))\S*@"
)  # greedy: a password may itself hold @, / or #
SPACED = re.compile(
    r"(?<!sqlite)(?<!file)(?<!hf)://(?!anonymous@[^@\n'\"]*(?:['\"\n]|$))((?!: |; )[^'\"\n])*@"
)  # and blanks, within a sentence
NO_SCHEME = re.compile(r"(?<![^\s'\"=(])[^\s'\"=:/(@]+:(?!/)\S*@")  # user:password@host
QUERY = re.compile(r"(?<!sqlite)(?<!file)(://[^\s'\"?]*\?)([^\s'\"]+?)(?=[:;,.)]*(?:[\s'\"]|$))")
ADDRESS = re.compile(r"(?!sqlite:|file:|hf:)[A-Za-z][\w+.-]*:/+")
STORES = (
    "s3",
    "gs",
    "gcs",
    "abfs",
    "abfss",
    "hdfs",
    "viewfs",
)  # schemes of object stores
PARAMETER = re.compile(r"([^&;=]+)(=?)([^&;]*)")


def public(text: str) -> str:
    """A text, such as a message, without users, passwords and tokens of the addresses in it."""
    text = USER.sub(rf":\1{MASK}@", text)
    text = SPACED.sub(f"://{MASK}@", text)
    text = NO_SCHEME.sub(f"{MASK}@", text)
    return QUERY.sub(lambda match: match[1] + _masked(match[2]), text)


def public_address(address: str) -> str:
    """The same for one address, whatever characters it holds; a path, or SQLite's file, stays as it is."""
    scheme = ADDRESS.match(address)
    if scheme is None:
        return address
    rest = address[scheme.end() :]
    user, at, host = rest.rpartition("@")
    path, mark, query = host.partition("?")
    shown = MASK if user and user != NOBODY else user
    return f"{scheme[0]}{shown}{at}{path}{mark}{_masked(query)}"


def has_secret(address: str) -> bool:
    """Whether an address holds what is not to be shown."""
    return public_address(address) != address


def without_secrets(text: str, address: str) -> str:
    """`public`, and without the address's own secrets where they stand alone: errors repeat parts of an address."""
    for secret in sorted(_secrets(address), key=len, reverse=True):
        text = text.replace(secret, MASK)
    return public(text)


def _secrets(address: str) -> set[str]:
    scheme = ADDRESS.match(address)
    if scheme is None:
        return set()
    userinfo, _, host = address[scheme.end() :].rpartition("@")
    user, colon, password = userinfo.partition(":")
    query = [match for match in PARAMETER.finditer(host.partition("?")[2]) if match[1] not in HARMLESS]
    found = {userinfo, password if colon else user, *(match[3] if match[2] else match[1] for match in query)}
    return {form for secret in found for form in (secret, unquote(secret))} - {"", MASK, NOBODY}


def _masked(query: str) -> str:
    """The parameters of an address, their values masked but for those that are harmless."""

    def mask(match: re.Match[str]) -> str:
        return match[0] if match[2] and match[1] in HARMLESS else f"{match[1]}={MASK}" if match[2] else MASK

    return PARAMETER.sub(mask, query)


# ---------------------------------------------------------------------------------------- of object stores


def is_address(place: str) -> bool:
    """Whether a text is an address, not a path."""
    return "://" in place


def wrong_with(address: str, source: str) -> str | None:
    """Why an address cannot be a data set's `root`, without its secrets; None if it may be one."""
    wrong = wrong_on_hub(address) if address.startswith("hf:") else wrong_address(address)
    if wrong or source == "parquet":
        return wrong
    return (
        f"data.source={source} needs a folder: from an object store Parquet files are read (data.source=parquet), "
        "which `bootvit data pack` makes of any source"
    )


def wrong_on_hub(address: str) -> str | None:
    """The same for a data set of the Hugging Face Hub, which has no keys in it: an `@` leads to a revision."""
    if re.fullmatch(r"hf://datasets/[^/@?]+/[^/@?]+(@[^/?]+)?(/[^?]*)?", address):
        return None
    return "expected hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME@REVISION, with a folder in it or without"


def wrong_address(address: str) -> str | None:
    """Why a text is no address of a folder in an object store, without its secrets; None if it is one."""
    scheme, separator, rest = address.partition("://")
    if not separator or scheme.lower() not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        return f"not an address of an object store, which begins with one of {known} (or give the path of a folder)"
    if scheme != scheme.lower():
        return f"write {scheme.lower()}://"
    if not re.match(r"[^/?]", rest):
        return f"it names no bucket or host: expected {scheme}://BUCKET/FOLDER"
    return _secret_in(address, scheme) if has_secret(address) else None


def _secret_in(address: str, scheme: str) -> str:
    if not has_secret(address.partition("?")[0]):
        known = "region, scheme, endpoint_override, tls_ca_file_path and retry_limit_seconds"
        return f"its parameters (after the '?') may be {known}; keys and tokens come from the store's own variables"
    azure = ", or abfs://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER" if scheme.startswith("abfs") else ""
    return (
        "an address holds no user, key or token here: leave it out, the store's own variables and files give it, "
        f"such as AWS_ACCESS_KEY_ID or ~/.aws/credentials{azure}"
    )
