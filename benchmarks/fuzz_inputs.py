"""Damage sound inputs by a seeded generator of random numbers.

There are three ways. Bytes are flipped, cut, doubled and spliced. Tokens that trouble parsers are
inserted. The tree of a JSON or TOML text gets values of other types, huge numbers, or deep nesting.
"""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["mutate_bytes", "mutate_json", "mutate_text", "mutate_tree"]

TOKENS = (
    *(b"[", b"]", b"{", b"}", b'"', b"'", b"=", b",", b":", b"\n", b"\r", b"\0", b"#", b"."),
    *(b"\x1b[31m", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"\xf0\x9f\x92\xa9"),
    *(b"nan", b"-inf", b"1e999", b"-0", b"0x", b"1_0", b"9" * 30, b"9" * 5000, b"true", b"null"),
    *(
        b"[" * 2000,
        b'{"a":' * 600,
        b"a." * 300,
        b'"""',
        b"'''",
        b"[[a]]\n",
        b"1979-05-27",
        b"[bold]",
    ),
    *(b"\0" * 64, b"\xff" * 8, b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"PK\x03\x04", b"\x1f\x8b"),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**40, 1.5, -0.5),
    *(0.0, 1e308, 1e-320, "", "x", "nan", "\x1b[2J", "[bold]", "a" * 3000, "../../x", "/dev/zero"),
    *([], {}, [[]], [None], {"": 0}, {"a": {"b": {}}}, [1, "x", 2.5], "torch:load", "1970-01-01"),
    *(float("inf"), float("nan"), "\ud800", "step-000000000001", ["x"] * 200),
)


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """Damage bytes in one to four places."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        content = random.choice(_DAMAGES)(content, random)
    return content


def mutate_text(content: bytes, random: Random) -> bytes:
    """Damage the bytes of a text, or insert a token."""
    if random.random() < 0.5:
        return mutate_bytes(content, random)
    at = random.randrange(len(content) + 1)
    return content[:at] + random.choice(TOKENS) + content[at + random.choice((0, 0, 1, 5)) :]


def mutate_tree(tree: Any, random: Random, odd: tuple[Any, ...] = ODD) -> Any:
    """Put odd values into a copy of nested dicts and lists, in one to three places."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 2, 3))):
        node = tree
        while True:
            inner = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not inner:
                break
            key = random.choice(inner)
            if isinstance(node[key], dict | list) and node[key] and random.random() < 0.7:
                node = node[key]
                continue
            _change(node, key, random, odd)
            break
    return tree


def mutate_json(content: bytes, random: Random) -> bytes:
    """Damage a JSON text or its tree."""
    if random.random() < 0.4:
        return mutate_text(content, random)
    text = json.dumps(mutate_tree(json.loads(content), random))
    return text.encode("utf8", "surrogatepass")


def _change(node: Any, key: Any, random: Random, odd: tuple[Any, ...]) -> None:
    kind = random.random()
    if kind < 0.6:
        node[key] = copy.deepcopy(random.choice(odd))
    elif kind < 0.7:
        del node[key]
    elif kind < 0.8 and isinstance(node, dict):
        node[random.choice(("x", "", "name", "args", f"{key}2"))] = node[key]
    elif kind < 0.9 and isinstance(node[key], int | float):
        node[key] = node[key] * random.choice((-1, 2, 10**6, 0.5))
    else:
        for _ in range(random.choice((1, 3, 9, 80))):
            node[key] = random.choice(([node[key]], {"a": node[key]}))


def _flip(content: bytes, random: Random) -> bytes:
    if not content:
        return content
    damaged = bytearray(content)
    for _ in range(random.choice((1, 1, 3, 16))):
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _double(content: bytes, random: Random) -> bytes:
    at, to = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return content[:to] + content[at:to] * random.choice((1, 1, 3)) + content[to:]


def _drop(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + content[at + random.choice((1, 2, 4, 64)) :]


def _move(content: bytes, random: Random) -> bytes:
    at, to = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return content[to:] + content[at:to] + content[:at]


def _splice(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    token = random.choice(TOKENS)
    return content[:at] + token + content[at + random.choice((0, len(token))) :]


_DAMAGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    *(_flip, _flip, _truncate, _double, _drop, _move, _splice),
)
