"""Processes that die in the middle of their work, and files that are damaged."""

import json
import os
import signal


def in_a_process(action):
    """Runs `action` in a forked process; returns its id."""
    process = os.fork()
    if not process:
        try:
            action()
        finally:
            os._exit(1)
    return process


def kill_myself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def header_edited(data, chance):
    """The file with one edit of its header that leaves it valid JSON."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    place, key = header, chance.choice(list(header))
    if key == "__metadata__" or chance.random() < 0.5:
        place = header[key]
        key = chance.choice(list(place))
    edit = chance.choice(["drop", "rename", "value", "copy"])
    if edit == "drop":
        del place[key]
    elif edit == "rename":
        place[key + "x"] = place.pop(key)
    elif edit == "copy":
        place[key + "x"] = place[key]
    else:
        new = ["", "0", "null", "F32", "I64", "BOOL", "F8_E4M3", "{}", [], [1], [0, 8], 0, -1, 2**63, None, {}, 1e300]
        place[key] = chance.choice([*new, str(place[key]).replace("1", "2"), str(place[key]).replace("false", "true")])
    edited = json.dumps(header).encode()
    return len(edited).to_bytes(8, "little") + edited + data[8 + size :]


def mutated(data, chance):
    """The file with one random damage."""
    a, b = sorted(chance.sample(range(len(data) + 1), 2))
    block = min(64, len(data) // 4)
    first, second = (chance.randrange(len(data) // 2 - block), chance.randrange(len(data) // 2, len(data) - block))
    kind = chance.choice(["flip"] * 4 + ["head", "cut", "insert", "swap", "header", "header", "double", "gap", "junk"])
    if kind in ("flip", "head"):
        changed = bytearray(data)
        at = chance.randrange(len(data) if kind == "flip" else min(400, len(data)))
        changed[at] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[: chance.choice([0, 1, 7, 8, 9, a, b])]
    if kind == "swap":
        parts = (data[:first], data[second : second + block], data[first + block : second])
        return b"".join([*parts, data[first : first + block], data[second + block :]])
    return {
        "insert": lambda: data[:a] + chance.randbytes(chance.randint(1, 16)) + data[a:],
        "header": lambda: header_edited(data, chance),
        "double": lambda: data + data,
        "gap": lambda: data[:a] + data[b:],
        "junk": lambda: data[:a] + chance.randbytes(b - a) + data[b:],
    }[kind]()
