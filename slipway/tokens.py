"""Bearer tokens of the gateway's clients: `python -m slipway.tokens add NAME | list | revoke NAME`.

home()/tokens.json, its owner's alone, names the client of every token by the token's SHA-256; the token itself is shown
once and kept nowhere. A token is 256 random bits, so nobody can try them out, and a fast hash keeps it as well as a
slow one would: slow ones are for passwords, which people choose from few. Without the file nobody needs a token; with
it everybody does, be it empty. A change is in force when the command returns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from slipway import artifacts, locks
from slipway.errors import PlatformError, SlipwayError, TransientError
from slipway.platforms.local import gateway
from slipway.platforms.local.layout import Layout, here

MAX_CLIENTS = 256
"""Each is a label of the metrics."""
RESERVED = frozenset({"slipway", "anonymous", "denied"})
"""Clients without a token, in the metrics."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")

Tokens = dict[str, Mapping[str, str]]
"""`client` and `created` (a date) by the token's SHA-256, hexadecimal."""


def read(layout: Layout) -> Tokens:
    """Read the tokens; none where there is no file.

    Raises:
        DataError: the file is no JSON.
    """
    return dict(artifacts.read_json(layout.tokens_file)) if layout.tokens_file.exists() else {}


def add(layout: Layout, client: str) -> str:
    """Make a token for a new client and put it in force; the token, which is not told again.

    Raises:
        SlipwayError: the name is taken or no name, or there are too many.
        TransientError: it was written, but the gateway did not take it.
    """
    if not _NAME.fullmatch(client) or client in RESERVED:
        raise SlipwayError(
            f"{client!r} cannot name a client: lower-case letters, digits and -, a letter first, not ours"
        )
    token = f"slipway_{secrets.token_urlsafe(32)}"

    def change(tokens: Tokens) -> None:
        if any(each["client"] == client for each in tokens.values()):
            raise SlipwayError(f"{client} has a token; revoke it, or name the new one otherwise, such as {client}-2")
        if len(tokens) >= MAX_CLIENTS:
            raise SlipwayError(f"there are {MAX_CLIENTS} clients, which is the most; revoke one first")
        tokens[hashed(token)] = {"client": client, "created": datetime.now(UTC).date().isoformat()}

    _change(layout, change)
    return token


def revoke(layout: Layout, client: str) -> None:
    """End a client's token.

    Raises:
        SlipwayError: there is no such client.
        TransientError: it was written, but the gateway did not take it.
    """

    def change(tokens: Tokens) -> None:
        mine = [key for key, token in tokens.items() if token["client"] == client]
        if not mine:
            raise SlipwayError(f"{client} has no token; there are: {', '.join(_names(tokens)) or 'none'}")
        for key in mine:
            del tokens[key]

    _change(layout, change)


def hashed(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def _change(layout: Layout, change: Callable[[Tokens], None]) -> None:
    """Change the file, then the gateway: one that is down reads the file when it starts."""
    with locks.held("tokens"):
        tokens = read(layout)
        change(tokens)
        with artifacts.writing(layout.tokens_file) as beside:
            beside.touch(mode=0o600)
            beside.write_text(json.dumps(tokens, indent=2) + "\n")
        try:
            gateway.put_tokens(layout, tokens)
        except PlatformError as error:
            if not isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                raise TransientError(f"{layout.tokens_file} is changed, but not yet in force: {error}") from error


def _names(tokens: Tokens) -> list[str]:
    return sorted(token["client"] for token in tokens.values())


def main() -> int:
    """Do what the command line says; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m slipway.tokens", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (("add", "make a token and print it, once"), ("revoke", "end a client's token")):
        commands.add_parser(command, help=text).add_argument("client", metavar="NAME", help="name of the client")
    commands.add_parser("list", help="name the clients")
    options = parser.parse_args()
    try:
        if options.command == "add":
            print(add(here(), options.client))
        elif options.command == "revoke":
            revoke(here(), options.client)
        else:
            for token in sorted(read(here()).values(), key=lambda token: token["client"]):
                print(f"{token['client']:<32} since {token['created']}")
    except SlipwayError as error:
        print(f"tokens: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
